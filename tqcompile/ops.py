"""The semantic operators a rewritten graph is made of: their schemas, shapes, and the provider for each device.

Each has one meaning, the plain PyTorch of `reference`. A CUDA tensor goes to a generated Triton kernel where one
exists; everything else goes to `cpu`, which is the reference with parts of it compiled.
"""

from collections.abc import Sequence

import torch

from tqcompile import coding, cpu, formats, recent, reference, tables, trellis
from tqcompile.codec import Codec
from tqcompile.layout import layout_of

Tensors = Sequence[torch.Tensor]

# How a product is made that has no kernel of its own, for the report.
DECODED = "decoded, a part of the heads at a time"
INTEGER = "int8 units"

_library = torch.library.Library("tqcompile", "DEF")
_library.define("encode(Tensor y, str codec) -> Tensor[]")
_library.define("append(Tensor(a!)[] planes, Tensor y, Tensor? positions, Tensor? basis, str codec) -> ()")
_library.define(
    "append_step(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor k, Tensor v, Tensor q, Tensor? positions, "
    "Tensor key_basis, Tensor? value_basis, str key_codec, str value_codec) -> Tensor"
)
_library.define(
    "attend(Tensor q, Tensor[] keys, Tensor[] values, Tensor? mask, Tensor? reach, Tensor? key_basis, "
    "Tensor? value_basis, bool causal, float scale, str score_mod, Tensor? sinks, str key_codec, str value_codec, "
    "int key_dim, int value_dim, ScalarType dtype, *, Tensor[]? exact=None, Tensor? asked=None, "
    "int first=0, Tensor[]? centre=None, Tensor[]? second=None, str second_codec='', int second_dim=0) -> Tensor"
)
_library.define(
    "remember(Tensor(a!) numbers, Tensor(b!) index, Tensor tokens, Tensor? positions, SymInt start, int dim, int sinks)"
    " -> ()"
)
_library.define("places(Tensor positions, SymInt length) -> Tensor")
_library.define("logits(Tensor q, Tensor[] keys, str codec, int head_dim) -> Tensor")
_library.define("mix(Tensor weights, Tensor[] values, str codec, int head_dim) -> Tensor")

encode = torch.ops.tqcompile.encode.default
append = torch.ops.tqcompile.append.default
append_step = torch.ops.tqcompile.append_step.default
attend = torch.ops.tqcompile.attend.default
logits = torch.ops.tqcompile.logits.default
mix = torch.ops.tqcompile.mix.default
remember = torch.ops.tqcompile.remember.default
places = torch.ops.tqcompile.places.default


def prepare(codec: Codec, head_dim: int, device: torch.device) -> None:
    """Make what the operators keep for a codec on `device`, so that none of it is made during a step."""
    tables.prepare(codec, head_dim)
    coding.prepare(codec, device)
    if device.type == "cuda":
        from tqcompile.kernels import append as kernel
        from tqcompile.kernels import chunks, integer

        kernel.prepare(codec, head_dim, device)
        integer.prepare(codec, head_dim, device)
        chunks.prepare(codec, head_dim, device)


def writes(codec: Codec, head_dim: int) -> bool:
    """Whether a GPU has a kernel that writes tokens of a codec; elsewhere a graph had better spell that out."""
    from tqcompile.kernels import writers

    return writers.writes(codec, head_dim)


def kernel_of(key_codec: str, value_codec: str, head_dims: tuple[int, int], same: bool = False) -> str:
    """What attends over a pair of codecs on a GPU, for the report; `same` where keys are the values."""
    from tqcompile.kernels import integer, portable

    codecs = formats.codec(key_codec), formats.codec(value_codec)
    if integer.sides_of(codecs, head_dims):
        return INTEGER
    latent = same and portable.is_latent(torch.float16, codecs[0], head_dims[0])
    return "portable, tiles of a latent" if latent else "portable, slower than dense attention"


def logits_kernel_of(codec: str, head_dim: int) -> str:
    """What multiplies queries by keys on a GPU, for the report."""
    from tqcompile.kernels import logits as kernel

    return INTEGER if kernel.side_of(formats.codec(codec), head_dim) else DECODED


def encoded(y: torch.Tensor, codec: str) -> list[torch.Tensor]:
    """What `encode` gives, of operators that a graph may hold."""
    return [plane.contiguous() for plane in coding.encode(formats.codec(codec), y)]


def _search_cuda(x: torch.Tensor, numbers: torch.Tensor, bits: int) -> torch.Tensor:
    from tqcompile.kernels import path

    with torch.cuda.device(x.get_device()):
        return path.search(x, numbers, bits)


trellis.SEARCHES["cuda"] = _search_cuda


def _places(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Positions as an assignment takes them, those below zero counted from the end; int64.

    An operator of its own, because Inductor computes what several operators take for each of them again.
    """
    return torch.where(positions < 0, positions + length, positions).long()


def _append_cpu(planes: Tensors, y: torch.Tensor, positions, basis, codec: str) -> None:
    reference.append(formats.codec(codec), planes, reference.rotate(y, basis), positions, cpu.encode_rows)


def _append_cuda(planes: Tensors, y: torch.Tensor, positions, basis, codec: str) -> None:
    from tqcompile.kernels import append as kernel

    codec, y = formats.codec(codec), reference.rotate(y, basis)
    with torch.cuda.device(y.get_device()):
        if writes(codec, codec.head_dim(y.shape[-1])):
            kernel.append(codec, planes, y, positions)
        else:
            reference.append(codec, planes, y, positions)


def _append_step_cpu(keys, values, k, v, q, positions, key_basis, value_basis, key_codec, value_codec):
    _append_cpu(keys, k, positions, key_basis, key_codec)
    _append_cpu(values, v, positions, value_basis, value_codec)
    return reference.rotate(q, key_basis).contiguous()


def _append_step_cuda(keys, values, k, v, q, positions, key_basis, value_basis, key_codec, value_codec):
    from tqcompile.kernels import step as kernel

    codecs = formats.codec(key_codec), formats.codec(value_codec)
    if not kernel.takes(codecs, k, v):
        _append_cuda(keys, k, positions, key_basis, key_codec)
        _append_cuda(values, v, positions, value_basis, value_codec)
        return reference.rotate(q, key_basis).contiguous()
    with torch.cuda.device(q.get_device()):
        return kernel.append_step(codecs, (keys, values), (k, v), q, positions, (key_basis, value_basis))


def _attend_cpu(
    q, keys, values, mask, reach, key_basis, value_basis, causal, scale, *others,
    exact=None, asked=None, first=0, centre=None, second=None, second_codec="", second_dim=0,
):  # fmt: skip
    score_mod, sinks, key_codec, value_codec, *dims, dtype = others
    codecs, start = (formats.codec(key_codec), formats.codec(value_codec)), 0
    asked, q = q if asked is None else asked, reference.rotate(q, key_basis)
    mask = reference.shifted(*centre, mask) if centre else mask
    if reach is not None and reach.numel() and not causal:
        start, keys, values, mask, second = _within(reach, keys, values, mask, second)
    if second:
        mask = reference.beside(_logits(second[0], second[1:], second_codec, second_dim), mask)
    known = recent.exact(exact, asked, start, start + keys[0].shape[2]) if exact else None
    out, theirs = cpu.attend(q, keys, values, mask, causal, scale, *codecs, tuple(dims), score_mod, sinks, known)
    if theirs is None:
        return reference.rotate_back(out, value_basis, dtype).contiguous()
    return (reference.rotate_back(out, value_basis, torch.float32) + theirs).to(dtype).contiguous()


def _within(reach: torch.Tensor, keys: Tensors, values: Tensors, mask: torch.Tensor, second: Tensors | None) -> tuple:
    """The first token that any sequence sees, and planes and mask from there to the last."""
    first, stop = int(reach[:, 0].min()), int(reach[:, 1].max())
    span = slice(first, max(first, stop))
    keys, values, others = ([plane[:, :, span] for plane in planes] for planes in (keys, values, (second or [])[1:]))
    return first, keys, values, mask[..., span], [second[0], *others] if second else None


def _attend_cuda(
    q, keys, values, mask, reach, key_basis, value_basis, causal, scale, *others,
    exact=None, asked=None, first=0, centre=None, second=None, second_codec="", second_dim=0,
):  # fmt: skip
    from tqcompile.kernels import attend as kernel

    score_mod, sinks, key_codec, value_codec, *dims, dtype = others
    codecs, dims = (formats.codec(key_codec), formats.codec(value_codec)), tuple(dims)
    options = {"basis": value_basis, "dtype": dtype, "score_mod": score_mod, "sinks": sinks}
    with torch.cuda.device(q.get_device()):
        seen = mask
        if centre:
            from tqcompile.kernels import shift

            mask = shift.shifted(*centre, mask)
        if exact:
            options |= {"known": exact, "asked": q if asked is None else asked, "first": first, "owned": bool(centre)}
        q = reference.rotate(q, key_basis)
        if second:
            from tqcompile.kernels.portable import Second

            second = Second(second[0], second[1:], formats.codec(second_codec), second_dim)
            if not kernel.joins(q, keys, values, codecs, dims, second):
                mask = reference.beside(_logits_cuda(second.q, second.planes, second_codec, second_dim), mask)
                second = None
            options["second"] = second
        if reach is not None and not causal:
            # Tokens that need none of the mask that it is of may need another.
            options["reach"] = reach if mask is seen else reach[:, :2]
        return kernel.attend(q, keys, values, mask, causal, scale, *codecs, dims, **options)


def _remember_cuda(numbers, index, tokens, positions, start, dim, sinks):
    from tqcompile.kernels import exact as kernel

    with torch.cuda.device(numbers.get_device()):
        kernel.remember(numbers, index, tokens, positions, start, dim, sinks)


def _logits(q: torch.Tensor, keys: Tensors, codec: str, head_dim: int) -> torch.Tensor:
    return cpu.logits(q, keys, formats.codec(codec), head_dim)


def _mix(weights: torch.Tensor, values: Tensors, codec: str, head_dim: int) -> torch.Tensor:
    return cpu.mix(weights, values, formats.codec(codec), head_dim)


def _logits_cuda(q: torch.Tensor, keys: Tensors, codec: str, head_dim: int) -> torch.Tensor:
    from tqcompile.kernels import decoded, portable
    from tqcompile.kernels import logits as kernel

    codec = formats.codec(codec)
    with torch.cuda.device(q.get_device()):
        if kernel.takes(q, keys, codec, head_dim):
            return kernel.logits(q, keys, codec, head_dim)
        look_up = portable.table_of(codec, head_dim, q.dtype, q.device)
        return decoded.logits(q, keys, codec, look_up).float()


def _mix_cuda(weights: torch.Tensor, values: Tensors, codec: str, head_dim: int) -> torch.Tensor:
    from tqcompile.kernels import decoded, portable

    codec = formats.codec(codec)
    with torch.cuda.device(weights.get_device()):
        look_up = portable.table_of(codec, head_dim, weights.dtype, weights.device)
        return decoded.mix(weights, values, codec, look_up, head_dim).float()


_library.impl("encode", reference.as_stored(encoded), "CPU")
_library.impl("encode", reference.as_stored(encoded), "CUDA")
_library.impl("append", reference.as_stored(_append_cpu), "CPU")
_library.impl("append", reference.as_stored(_append_cuda), "CUDA")
_library.impl("append_step", reference.as_stored(_append_step_cpu), "CPU")
_library.impl("append_step", reference.as_stored(_append_step_cuda), "CUDA")
_library.impl("attend", reference.as_stored(_attend_cpu), "CPU")
_library.impl("attend", reference.as_stored(_attend_cuda), "CUDA")
_library.impl("remember", recent.remember, "CPU")
_library.impl("remember", _remember_cuda, "CUDA")
_library.impl("places", _places, "CPU")
_library.impl("places", _places, "CUDA")
_library.impl("logits", reference.as_stored(_logits), "CPU")
_library.impl("logits", reference.as_stored(_logits_cuda), "CUDA")
_library.impl("mix", reference.as_stored(_mix), "CPU")
_library.impl("mix", reference.as_stored(_mix_cuda), "CUDA")


@torch.library.register_fake("tqcompile::encode", lib=_library)
def _(y, codec):
    codec = formats.codec(codec)
    layout = layout_of(codec, codec.head_dim(int(y.shape[-1])), torch.float32, y.device.type)
    return [y.new_empty((*y.shape[:-1], store.width), dtype=store.dtype) for store in layout.stores]


@torch.library.register_fake("tqcompile::append", lib=_library)
def _(planes, y, positions, basis, codec):
    return None


@torch.library.register_fake("tqcompile::append_step", lib=_library)
def _(keys, values, k, v, q, positions, key_basis, value_basis, key_codec, value_codec):
    return q.new_empty((*q.shape[:-1], key_basis.shape[0]), dtype=key_basis.dtype)


@torch.library.register_fake("tqcompile::attend", lib=_library)
def _(q, keys, values, mask, reach, key_basis, value_basis, causal, scale, *others, **beside):
    value_dim, dtype = others[-2:]
    return q.new_empty((*q.shape[:-1], value_dim), dtype=dtype)


@torch.library.register_fake("tqcompile::remember", lib=_library)
def _(numbers, index, tokens, positions, start, dim, sinks):
    return None


@torch.library.register_fake("tqcompile::places", lib=_library)
def _(positions, length):
    return positions.new_empty(positions.shape, dtype=torch.int64)


@torch.library.register_fake("tqcompile::logits", lib=_library)
def _(q, keys, codec, head_dim):
    return q.new_empty((*q.shape[:-1], keys[0].shape[2]), dtype=torch.float32)


@torch.library.register_fake("tqcompile::mix", lib=_library)
def _(weights, values, codec, head_dim):
    coordinates = formats.codec(codec).coordinates(head_dim)
    return weights.new_empty((*weights.shape[:-1], coordinates), dtype=torch.float32)
