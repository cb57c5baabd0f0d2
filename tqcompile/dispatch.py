"""What eager code may do to a compressed cache.

Three tables: operators that move whole tokens run on each plane; writes encode first; any other operator reads a
decoded copy. An operator that would write into that copy raises, because the write would be lost.
"""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only

from tqcompile.cache import CompressedKV, encode_dense

aten = torch.ops.aten


def run(func, args: tuple, kwargs: dict):
    """Run an ATen operator some of whose arguments are compressed."""
    handler = _WRITES.get(func)
    if handler is not None and isinstance(args[0], CompressedKV):
        _check_writable(func, args[0])
        handler(*args, **kwargs)
        return args[0]
    handler = _MOVES.get(func)
    if handler is not None:
        result = handler(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    _refuse_lost_writes(func, args, kwargs)
    args, kwargs = tree_map_only(CompressedKV, CompressedKV.decode, (args, kwargs))
    return func(*args, **kwargs)


def _refuse_lost_writes(func, args: tuple, kwargs: dict) -> None:
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else (value,)
        if argument.is_write and any(isinstance(item, CompressedKV) for item in values):
            raise RuntimeError(
                f"{func} writes into a compressed cache in a way its codes cannot follow; "
                "write whole tokens (index_copy_, copy_, an indexed assignment), or work on cache.decode()"
            )


def _check_writable(func, cache: CompressedKV) -> None:
    if cache.buffer is not None and cache.buffer.shared:
        raise RuntimeError(
            f"{func} writes into a compressed cache whose tokens another cache continues; "
            "clone() it first, and write to the clone"
        )


def _planes_alike(cache: CompressedKV, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Planes of `value` in the codec of `cache`."""
    if isinstance(value, CompressedKV):
        if value.codec is cache.codec and (cache.codec.fit != "exact" or value.dtype == cache.dtype):
            return value.planes
        value = value.decode()
    if value.shape[-1:] != cache.shape[-1:]:
        value = value.expand(*value.shape[:-1], cache.shape[-1])
    return encode_dense(value.to(cache.dtype), cache.codec)


def _leading(cache: CompressedKV, dim: int) -> int | None:
    """`dim` counted from the front, or None where it is the compressed one."""
    dim = dim % cache.dim()
    return dim if dim < cache.dim() - 1 else None


def _along(func, cache, dim=0, *args, **kwargs):
    """Operators whose second argument is the one dimension they work along."""
    dim = _leading(cache, dim)
    if dim is None:
        return NotImplemented
    results = [func(plane, dim, *args, **kwargs) for plane in cache.planes]
    if isinstance(results[0], torch.Tensor):
        return cache.like(tuple(results))
    return [cache.like(planes) for planes in zip(*results)]


def _slice(func, cache, dim=0, start=None, end=None, step=1):
    result = _along(func, cache, dim, start, end, step)
    prefix = dim % cache.dim() if result is not NotImplemented else None
    buffer = cache.buffer
    if prefix is not None and buffer is not None and cache.start >= 0 and buffer.seq_dim == prefix and step == 1:
        first = slice(start, end).indices(cache.shape[prefix])[0]
        result.start = cache.start + first
    return result


def _unsqueeze(func, cache, dim):
    dim = dim % (cache.dim() + 1)
    return cache.like(tuple(func(plane, dim) for plane in cache.planes)) if dim < cache.dim() else NotImplemented


def _pieces(func, cache, size, dim=0):
    dim = _leading(cache, dim)
    if dim is None:
        return NotImplemented
    pieces = zip(*(func(plane, size, dim) for plane in cache.planes))
    return [cache.like(planes) for planes in pieces]


def _index_select(func, cache, dim, index):
    dim = _leading(cache, dim)
    if dim is None or not isinstance(cache, CompressedKV):
        return NotImplemented
    return _fresh(cache, tuple(func(plane, dim, index) for plane in cache.planes))


def _index(func, cache, indices):
    if not isinstance(cache, CompressedKV) or len(indices) >= cache.dim() or not _tensor_indices_stay(cache, indices):
        return NotImplemented
    return _fresh(cache, tuple(func(plane, indices) for plane in cache.planes))


def _tensor_indices_stay(cache: CompressedKV, indices) -> bool:
    consumed = sum(1 if index is None or index.dtype != torch.bool else index.dim() for index in indices)
    return consumed < cache.dim()


def _permute(func, cache, dims):
    if dims[-1] % cache.dim() != cache.dim() - 1:
        return NotImplemented
    return cache.like(tuple(func(plane, dims) for plane in cache.planes))


def _transpose(func, cache, first, second):
    if _leading(cache, first) is None or _leading(cache, second) is None:
        return NotImplemented
    return cache.like(tuple(func(plane, first % cache.dim(), second % cache.dim()) for plane in cache.planes))


def _expand(func, cache, size, **kwargs):
    if size[-1] not in (-1, cache.shape[-1]) or len(size) < cache.dim():
        return NotImplemented
    return cache.like(tuple(func(plane, (*size[:-1], -1), **kwargs) for plane in cache.planes))


def _view(func, cache, size):
    """Regroup the leading dimensions; row-major order keeps every token whole where the last size is unchanged."""
    if size[-1] != cache.shape[-1]:
        return NotImplemented
    planes = tuple(plane.reshape(*size[:-1], plane.shape[-1]) for plane in cache.planes)
    same = all(new.data_ptr() == old.data_ptr() for new, old in zip(planes, cache.planes))
    return cache.like(planes) if same else _fresh(cache, planes)


def _repeat(func, cache, repeats):
    if repeats[-1] != 1:
        return NotImplemented
    return _fresh(cache, tuple(func(plane, repeats) for plane in cache.planes))


def _flip(func, cache, dims):
    if any(_leading(cache, dim) is None for dim in dims):
        return NotImplemented
    return _fresh(cache, tuple(func(plane, [dim % cache.dim() for dim in dims]) for plane in cache.planes))


def _roll(func, cache, shifts, dims=()):
    if not dims or any(_leading(cache, dim) is None for dim in dims):
        return NotImplemented
    return _fresh(cache, tuple(func(plane, shifts, [dim % cache.dim() for dim in dims]) for plane in cache.planes))


def _clone(func, cache, **kwargs):
    return _fresh(cache, tuple(plane.clone(memory_format=torch.contiguous_format) for plane in cache.planes))


def _alias(func, cache, **kwargs):
    other = cache.like(cache.planes)
    other.start = cache.start
    return other


def _to_copy(func, cache, *, dtype=None, device=None, layout=None, pin_memory=None, non_blocking=False, **kwargs):
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    dtype = dtype or cache.dtype
    own = cache.codec.fit == "exact"
    planes = tuple(
        plane.to(device=device, dtype=dtype if own else None, non_blocking=non_blocking, copy=True)
        for plane in cache.planes
    )
    return CompressedKV(planes, cache.codec, cache.shape[-1], dtype)


def _cat(func, tensors, dim=0):
    first = tensors[0]
    if all(
        isinstance(part, CompressedKV) and part.codec is first.codec and part.dtype == first.dtype for part in tensors
    ):
        axis = _leading(first, dim)
        if axis is not None:
            return _fresh(first, tuple(func(list(planes), axis) for planes in zip(*(part.planes for part in tensors))))
    if not isinstance(first, CompressedKV) or any(part.dim() != first.dim() for part in tensors):
        return NotImplemented
    axis = _leading(first, dim)
    if axis is None or any(part.dtype != first.dtype or part.shape[-1] != first.shape[-1] for part in tensors[1:]):
        return NotImplemented
    for part in tensors[1:]:
        grown = first.room(part.shape[axis], axis)
        for target, code in zip(grown.planes, _planes_alike(first, part)):
            target.narrow(axis, first.shape[axis], part.shape[axis]).copy_(code)
        first = grown
    return first


def _fresh(cache: CompressedKV, planes: tuple[torch.Tensor, ...]) -> CompressedKV:
    return CompressedKV(planes, cache.codec, cache.shape[-1], cache.dtype)


def _write_copy(cache, source, non_blocking=False):
    for plane, code in zip(cache.planes, _planes_alike(cache, source)):
        plane.copy_(code)


def _write_index_copy(cache, dim, index, source):
    axis = _leading(cache, dim)
    if axis is None:
        raise RuntimeError("index_copy_ along head_dim would re-encode every token of a compressed cache; decode() it")
    if source.dtype != cache.dtype:
        raise RuntimeError(f"index_copy_: the cache is {cache.dtype} and the source is {source.dtype}; cast the source")
    for plane, code in zip(cache.planes, _planes_alike(cache, source)):
        plane.index_copy_(axis, index, code)


def _write_index_put(cache, indices, values, accumulate=False):
    if accumulate or not _tensor_indices_stay(cache, indices):
        raise RuntimeError("only whole tokens can be assigned to a compressed cache, and not accumulated; decode() it")
    for plane, code in zip(cache.planes, _planes_alike(cache, values)):
        aten.index_put_.default(plane, indices, code)


def _write_zero(cache):
    for plane in cache.planes:
        plane.zero_()


def _write_fill(cache, value):
    if float(value) != 0:
        raise RuntimeError(f"a compressed cache can be filled with 0, not with {value}; decode() it")
    _write_zero(cache)


_WRITES: dict[object, Callable] = {
    aten.copy_.default: _write_copy,
    aten.index_copy_.default: _write_index_copy,
    aten.index_put_.default: _write_index_put,
    aten.zero_.default: _write_zero,
    aten.fill_.Scalar: _write_fill,
    aten.fill_.Tensor: _write_fill,
}

_MOVES: dict[object, Callable] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _along,
    aten.squeeze.dim: _along,
    aten.unbind.int: _along,
    aten.unsqueeze.default: _unsqueeze,
    aten.split.Tensor: _pieces,
    aten.split_with_sizes.default: _pieces,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.repeat.default: _repeat,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    aten.clone.default: _clone,
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.lift_fresh.default: _alias,
    aten._to_copy.default: _to_copy,
    aten.cat.default: _cat,
}
