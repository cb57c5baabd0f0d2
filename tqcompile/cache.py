"""`CompressedKV`: the tensor that a model holds where its dense cache was.

It has the shape and dtype of the cache it stands for and no storage of its own. Its planes keep the leading
dimensions in the model's order, so that whatever moves whole tokens is done on the planes; anything else decodes.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext

import torch

from tqcompile import coding, formats, reference, tables
from tqcompile.buffer import Buffer, Planes
from tqcompile.centre import Centre, Centring, Rotation
from tqcompile.codec import Codec
from tqcompile.encoding import encode_dense
from tqcompile.guarded import Guarded, flattener
from tqcompile.readonly import in_parts
from tqcompile.recent import Recent, Regions, empty


class CompressedKV(torch.Tensor):
    """A cache of keys or values [..., head_dim] kept as the planes [..., width] of a codec.

    `centre` is what was taken off its tokens, or None. `part_of` are the caches it was taken from, and `family` they
    and all views of them. `copied` says that it should show their memory but its planes could only be copied: a write
    would be lost. `counted` takes what eager code makes of it, for the report. `recent` has some of its tokens as they
    are, less that centre. It has another `stamp` once it keeps other tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    planes: Planes
    codec: Codec
    buffer: Buffer | None
    start: int
    centre: Centre | None
    part_of: tuple[weakref.ref, ...]
    family: list[weakref.ref]
    copied: bool
    counted: "Callable[..., None] | None"
    recent: Recent | None
    anchor = torch.empty(0)

    @staticmethod
    def __new__(
        cls,
        planes: Planes,
        codec: Codec,
        head_dim: int,
        dtype: torch.dtype,
        buffer: Buffer | None = None,
        start: int = 0,
        strides: tuple[int, ...] | None = None,
    ) -> "CompressedKV":
        shape, device = (*planes[0].shape[:-1], head_dim), planes[0].device
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            self = torch.Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)
        torch._C._set_throw_on_mutable_data_ptr(self)
        self.__dict__.update(planes=tuple(planes), codec=codec, buffer=buffer, start=start, centre=None, recent=None)
        self.__dict__.update(part_of=(), family=[], copied=False, counted=None, stamp=object())
        self._guard(dtype, device)
        return self

    def __setattr__(self, name: str, value) -> None:
        if name not in self.__dict__:
            return super().__setattr__(name, value)
        self.__dict__[name] = value
        if name in ("planes", "buffer", "centre", "recent"):
            self.__dict__["stamp"] = object()
        if name == "centre":
            self._guard(self.dtype, self.device)

    def _guard(self, dtype: torch.dtype, device: torch.device) -> None:
        kind = None if self.centre is None else self.centre.kind
        self.__dict__["__tensor_flatten__"] = flattener(self.codec.name, dtype, device, kind)

    @classmethod
    def encode(cls, dense: torch.Tensor, codec: Codec, centring: Centring | None = None) -> "CompressedKV":
        """A compressed copy of `dense` [..., head_dim]; of what is left of it where it is centred.

        Raises:
            TypeError: `dense` is no tensor, or `codec` no codec.
            ValueError: a dtype or head_dim that no layout exists for.
        """
        if not isinstance(dense, torch.Tensor) or dense.dim() == 0:
            found = "a tensor without dimensions" if isinstance(dense, torch.Tensor) else type(dense).__name__
            raise TypeError(f"dense is {found}; give a tensor [..., head_dim]")
        if not isinstance(codec, Codec):
            raise TypeError(f"codec={codec!r} is no codec; tqcompile.formats.codec(name) makes one")
        dense = dense.decode() if isinstance(dense, CompressedKV) else dense
        centre = None if centring is None else centring.of(dense)
        left = dense if centre is None else centre.less(dense)
        return cls(encode_dense(left, codec), codec, dense.shape[-1], dense.dtype).centred(centre)

    @reference.as_stored
    def decode(self) -> torch.Tensor:
        """The dense tensor this cache stands for, decoded anew: [..., head_dim] in the cache's dtype."""
        basis = tables.basis_matrix(self.codec, self.shape[-1], self.device)
        rows = coding.decode(self.codec, self.planes, self.shape[-1])
        if self.centre is not None:
            return self.centre.more(reference.rotate_back(rows, basis, torch.float32)).to(self.dtype)
        dense = reference.rotate_back(rows, basis, self.dtype)
        return dense.clone(memory_format=torch.contiguous_format) if self.codec.is_exact else dense.contiguous()

    def centred(self, centre: Centre | None) -> "CompressedKV":
        """This cache, as one whose tokens `centre` was taken off."""
        if centre is not self.centre:
            self.centre = centre
        return self

    @property
    def parts(self) -> Planes:
        """What a compiled graph is given: the planes, and the vectors of the centre where there is one."""
        return self.planes if self.centre is None else (*self.planes, self.centre.vectors)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it keeps."""
        return self.parts if self.recent is None else (*self.parts, *self.recent.tensors)

    def decoded_for(self, reader: str) -> torch.Tensor:
        """`decode()` for an operator that is not compiled, which the report tells of."""
        if self.counted is not None:
            self.counted(self, reader)
        return self.decode()

    def like(self, planes: Planes, strides: tuple[int, ...]) -> "CompressedKV":
        """The view of this cache that these planes are.

        `strides` are those of the same view of a dense cache: they decide whether `contiguous()` copies.
        """
        copied = not all(p.untyped_storage()._cdata == q.untyped_storage()._cdata for p, q in zip(planes, self.planes))
        buffer = None if copied else self.buffer
        start = -1 if buffer is None else buffer.place(planes[0])
        other = CompressedKV(planes, self.codec, self.shape[-1], self.dtype, buffer, start, strides)
        other.part_of = (*self.part_of, weakref.ref(self))
        other.copied, other.family = copied or self.copied, self.family
        self.family[:] = [*self.others, weakref.ref(self), weakref.ref(other)]
        if copied and self.buffer is not None:
            self.buffer.hold(other)
        return self.counting(other)

    def counting(self, made: "CompressedKV") -> "CompressedKV":
        """`made` of this cache, which the report counts where it counts this one."""
        if self.counted is not None:
            self.counted(made)
        return made

    @property
    def is_part(self) -> bool:
        """Whether it shows a part of another cache, or all of it, that is alive."""
        return any(whole() is not None for whole in self.part_of)

    @property
    def others(self) -> list[weakref.ref]:
        """The other live ones of its family, which a write into it may change."""
        return [other for other in self.family if other() is not None and other() is not self]

    def room(self, tokens: int, seq_dim: int) -> "CompressedKV":
        """A cache with `tokens` more places after this one's, not written yet; a copy where another continues this."""
        length = self.shape[seq_dim]
        buffer, start = self.buffer, self.start
        in_place = buffer is not None and start >= 0 and buffer.fits(start + length, tokens, seq_dim)
        if not in_place:
            buffer, start = Buffer(self.planes, seq_dim, tokens), 0
        buffer.used += tokens
        planes = buffer.view(start, start + length + tokens)
        grown = CompressedKV(planes, self.codec, self.shape[-1], self.dtype, buffer, start)
        if self.recent is not None:
            grown.recent = self.recent if in_place else self.recent.copy(length)
        buffer.hold(grown)
        return grown.centred(self.centre)

    def kept(self, seq_dim: int, run: slice) -> "CompressedKV":
        """The tokens `run` of a cache in a buffer, whose memory they keep until what is left moves to another."""
        start, stop, _ = run.indices(self.shape[seq_dim])
        if (start, stop) == (0, self.shape[seq_dim]):
            return self
        assert self.buffer is not None and self.start >= 0, "only a cache that grew is cut"
        stop = max(start, stop)
        planes = self.buffer.view(self.start + start, self.start + stop)
        rest = CompressedKV(planes, self.codec, self.shape[-1], self.dtype, self.buffer, self.start + start)
        self.buffer.hold(rest)
        return rest

    def in_order(self) -> "CompressedKV":
        """This cache, or a copy of it whose planes lie as those of a graph that only reads them."""
        if all(plane.is_contiguous() for plane in self.planes):
            return self
        planes = tuple(plane.contiguous() for plane in self.planes)
        ordered = CompressedKV(planes, self.codec, self.shape[-1], self.dtype).centred(self.centre)
        ordered.recent = self.recent
        return ordered

    def keep(self, regions: Regions | None) -> None:
        """Make what is kept as it is of tokens that a graph writes fit what that graph keeps; None where it keeps none.

        No other of the family keeps anything of its own: it would not be told of what is written.
        """
        if (self.recent and self.recent.regions) != regions:
            self.recent = None if regions is None else empty(self, regions)
        for other in self.others:
            if other().recent is not self.recent:
                other().recent = None

    def own(self) -> str | None:
        """Make the planes this cache's alone, and contiguous, before a graph writes there, or say why not."""
        alone = self.buffer is None or not self.buffer.shared
        if alone and not self.copied and all(plane.is_contiguous() for plane in self.planes):
            return None
        if self.is_part:
            return "it is a view of another compressed cache, whose planes lie otherwise"
        if self.others:
            return "a view of it is alive, which would not follow it to planes that lie as this graph writes them"
        with torch.inference_mode(False):
            self.planes = tuple(plane.clone(memory_format=torch.contiguous_format) for plane in self.planes)
        self.recent = self.recent and self.recent.copy(self.shape[self.recent.regions.dim])
        self.buffer, self.start = None, 0
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of live storage behind this cache, spare capacity included."""
        return sum(storage.nbytes() for storage in storages(self).values())

    def _is_view(self) -> bool:
        # Dynamo would rebuild a view out of its base's inner tensors; planes know for themselves what they show.
        return False

    def __tensor_flatten__(self):
        return self.__dict__["__tensor_flatten__"]()

    @staticmethod
    def __tensor_unflatten__(inner, context: Guarded, outer_size, outer_stride):
        mode = torch._guards.detect_fake_mode()
        assert mode is not None, "a compressed cache is only flattened while a compiler traces"
        with mode:
            return torch.empty_strided(outer_size, outer_stride, dtype=context.dtype, device=context.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from tqcompile import followed

        return in_parts(followed.run, func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"CompressedKV({self.codec.name}, shape={tuple(self.shape)}, dtype={self.dtype}, {self.nbytes} bytes)"

    @property
    def data(self) -> "CompressedKV":
        return self.detach()

    @data.setter
    def data(self, value) -> None:
        raise RuntimeError("a compressed cache has no dense memory that .data could replace; use copy_()")

    def __copy__(self) -> "CompressedKV":
        return self.detach()

    def __deepcopy__(self, memo) -> "CompressedKV":
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol):
        planes = tuple(plane.clone(memory_format=torch.contiguous_format) for plane in self.planes)
        return _rebuild, (planes, self.codec.name, self.shape[-1], self.dtype, self.centre)

    def numpy(self, *, force: bool = False):
        """A decoded array; read-only, because what is written there would not reach the cache."""
        array = self.decode().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> list:
        return self.decode().tolist()

    def __array__(self, dtype=None, copy=None):
        return self.numpy().astype(dtype) if dtype else self.numpy()

    def __dlpack__(self, *args, **kwargs):
        raise RuntimeError("a compressed cache has no dense memory to share; call .decode() first")


def _rebuild(planes: Planes, codec: str, head_dim: int, dtype: torch.dtype, centre=None) -> CompressedKV:
    return CompressedKV(planes, formats.codec(codec), head_dim, dtype).centred(centre)


torch.serialization.add_safe_globals([_rebuild, Centre, Rotation])


def storages(cache: torch.Tensor) -> dict[int, torch.UntypedStorage]:
    """The live storages behind a dense or compressed cache, by identity: empty ones share an address."""
    tensors = cache.tensors if isinstance(cache, CompressedKV) else (cache,)
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in found}
