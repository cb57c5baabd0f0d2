"""What eager code may do to a compressed cache.

Views and copies that move whole tokens run on each plane; writes encode first; any other operator reads a decoded
copy. What would write into that copy raises, because the write would be lost.
"""

import math
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only

from tqcompile.cache import CompressedKV
from tqcompile.dispatch_writes import ADVICE, WRITES, check_writable, leading, names_tokens, planes_alike, whole_tokens
from tqcompile.layout import along_plane
from tqcompile.readonly import ReadOnly

aten = torch.ops.aten

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# Between two of its graphs Dynamo would compile this too, and tensors that it traces with cannot be made read-only.
@torch.compiler.disable
def run(func, args: tuple, kwargs: dict):
    """Run an ATen operator some of whose arguments are compressed, or decoded and read-only."""
    first = args[0] if args else None
    if isinstance(first, CompressedKV):
        if func in WRITES:
            check_writable(func, first)
            WRITES[func](*args, **kwargs)
            return first
        if func in _VIEWS:
            planes = _VIEWS[func](func, *args, **kwargs)
            if planes is not NotImplemented:
                return _views(func, first, planes, args, kwargs)
    if func in _COPIES and isinstance(first, (CompressedKV, list, tuple)):
        result = _COPIES[func](func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    return decoded(func, args, kwargs)


def decoded(func, args: tuple, kwargs: dict):
    """Run an operator on decoded copies of the caches among its arguments."""
    _refuse_lost_writes(func, args, kwargs)
    if func is aten.as_strided.default and not args[0].is_contiguous():
        raise RuntimeError("as_strided of a view of a compressed cache has no memory to stride over; decode() it first")
    # A cache is no inference tensor, and PyTorch wants its views to be none either.
    with torch.inference_mode(torch.is_inference_mode_enabled() and not func.is_view):
        args, kwargs = tree_map_only(CompressedKV, lambda cache: cache.decoded_for(str(func)), (args, kwargs))
        args, kwargs = tree_map_only(ReadOnly, lambda view: view.dense, (args, kwargs))
        # A view of a dense cache may be one that the decoded copy has to be copied for.
        result = (aten.reshape.default if func is aten.view.default else func)(*args, **kwargs)
    return tree_map_only(torch.Tensor, ReadOnly, result) if func.is_view else result


def _refuse_lost_writes(func, args: tuple, kwargs: dict) -> None:
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else (value,)
        if not argument.is_write:
            continue
        if any(isinstance(item, CompressedKV) for item in values):
            raise RuntimeError(f"{func} writes into a compressed cache in a way its codes cannot follow; {ADVICE}")
        if any(isinstance(item, ReadOnly) for item in values):
            raise RuntimeError(f"{func} writes into a decoded view, and a compressed cache would not see it; {ADVICE}")


def _views(func, cache: CompressedKV, planes: list, args: tuple, kwargs: dict):
    """Views that `func` made of each plane, as views of the cache, with a dense one's strides: a dense tensor without
    memory is asked first, and complains about bad arguments as any would.
    """
    twin = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device="meta")
    shaped = func(twin, *args[1:], **kwargs)
    if isinstance(shaped, torch.Tensor):
        return cache.like(tuple(planes), shaped.stride())
    return [cache.like(pieces, piece.stride()) for pieces, piece in zip(zip(*planes), shaped)]


def _along(func, cache, dim=0, *args, **kwargs):
    """Operators whose second argument is the one dimension they work along."""
    dim = leading(cache, dim)
    return NotImplemented if dim is None else [func(plane, dim, *args, **kwargs) for plane in cache.planes]


def _pieces(func, cache, size, dim=0):
    dim = leading(cache, dim)
    return NotImplemented if dim is None else [func(plane, size, dim) for plane in cache.planes]


def _same(func, cache, **kwargs):
    return list(map(func, cache.planes))


def _unsqueeze(func, cache, dim):
    fits = -cache.dim() <= dim < cache.dim() and dim != -1
    return [func(plane, dim) for plane in cache.planes] if fits else NotImplemented


def _permute(func, cache, dims):
    if len(dims) != cache.dim() or dims[-1] not in (-1, cache.dim() - 1):
        return NotImplemented
    return [func(plane, dims) for plane in cache.planes]


def _transpose(func, cache, first, second):
    first, second = leading(cache, first), leading(cache, second)
    return NotImplemented if None in (first, second) else [func(plane, first, second) for plane in cache.planes]


def _expand(func, cache, size, **kwargs):
    if len(size) < cache.dim() or size[-1] not in (-1, cache.shape[-1]):
        return NotImplemented
    return [func(plane, (*size[:-1], -1), **kwargs) for plane in cache.planes]


def _view(func, cache, size):
    """Regroup the leading dimensions; row-major order keeps every token whole where the last size is unchanged."""
    size, known = list(size), math.prod(extent for extent in size if extent != -1)
    if -1 in size:
        size[size.index(-1)] = cache.numel() // known if known else 0
    if not size or size[-1] != cache.shape[-1] or math.prod(size) != cache.numel():
        return NotImplemented
    return [plane.reshape(*size[:-1], plane.shape[-1]) for plane in cache.planes]


def _fresh(cache: CompressedKV, planes, dtype: torch.dtype | None = None) -> CompressedKV:
    planes = tuple(plane.contiguous() for plane in planes)
    return cache.counting(CompressedKV(planes, cache.codec, cache.shape[-1], dtype or cache.dtype))


def _index_select(func, cache, dim, index):
    dim = leading(cache, dim)
    return NotImplemented if dim is None else _fresh(cache, (func(plane, dim, index) for plane in cache.planes))


def _gather(func, cache, dim, index, **kwargs):
    dim = leading(cache, dim)
    if dim is None or not names_tokens(cache, index):
        return NotImplemented
    return _fresh(cache, (func(plane, dim, along_plane(index, plane)) for plane in cache.planes))


def _index(func, cache, indices):
    if len(indices) >= cache.dim() or not whole_tokens(cache, indices):
        return NotImplemented
    return _fresh(cache, (func(plane, indices) for plane in cache.planes))


def _repeat(func, cache, repeats):
    whole = len(repeats) >= cache.dim() and repeats[-1] == 1
    return _fresh(cache, (func(plane, repeats) for plane in cache.planes)) if whole else NotImplemented


def _flip(func, cache, dims):
    axes = [leading(cache, dim) for dim in dims]
    return NotImplemented if None in axes else _fresh(cache, (func(plane, axes) for plane in cache.planes))


def _roll(func, cache, shifts, dims=()):
    axes = [leading(cache, dim) for dim in dims]
    if not axes or None in axes:
        return NotImplemented
    return _fresh(cache, (func(plane, shifts, axes) for plane in cache.planes))


def _clone(func, cache, **kwargs):
    return _fresh(cache, (plane.clone(memory_format=torch.contiguous_format) for plane in cache.planes))


def _to_copy(func, cache, *, dtype=None, device=None, layout=None, pin_memory=None, non_blocking=False, **kwargs):
    dtype = dtype or cache.dtype
    if dtype not in FLOATS:
        return NotImplemented
    own = dtype if cache.codec.is_exact else None
    planes = (p.to(device=device, dtype=own, non_blocking=non_blocking, copy=True) for p in cache.planes)
    return _fresh(cache, planes, dtype)


def _cat(func, tensors, dim=0):
    first = tensors[0]
    axis = leading(first, dim) if isinstance(first, CompressedKV) else None
    if axis is None or not all(_joins(first, part, axis) for part in tensors):
        return NotImplemented
    if all(isinstance(part, CompressedKV) and part.codec is first.codec for part in tensors):
        return _fresh(first, (func(list(planes), axis) for planes in zip(*(part.planes for part in tensors))))
    for part in tensors[1:]:
        codes = planes_alike(first, part)
        grown = first.counting(first.room(part.shape[axis], axis))
        for target, code in zip(grown.planes, codes):
            target.narrow(axis, first.shape[axis], part.shape[axis]).copy_(code)
        first = grown
    return first


def _joins(first: CompressedKV, part: torch.Tensor, axis: int) -> bool:
    if part.dim() != first.dim() or part.dtype != first.dtype or part.device != first.device:
        return False
    return all(dim == axis or part.shape[dim] == size for dim, size in enumerate(first.shape))


def _stack(func, tensors, dim=0):
    if not all(isinstance(part, CompressedKV) for part in tensors):
        return NotImplemented
    return _cat(aten.cat.default, [part.unsqueeze(dim) for part in tensors], dim)


# Each gives what the operator makes of every plane.
_VIEWS: dict[object, Callable] = {
    aten.slice.Tensor: _along,
    aten.select.int: _along,
    aten.squeeze.dim: _along,
    aten.unbind.int: _along,
    aten.unsqueeze.default: _unsqueeze,
    aten.split.Tensor: _pieces,
    aten.split_with_sizes.default: _pieces,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.lift_fresh.default: _same,
}

_COPIES: dict[object, Callable] = {
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.index.Tensor: _index,
    aten.repeat.default: _repeat,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
}
