"""What eager code may do to a cache whose tokens are less a centre: what leaves every token at its place, on codes.

Anything else reads a decoded copy. What is written is taken the same centre off, at the places that it goes to.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from tqcompile import dispatch, principal
from tqcompile.cache import CompressedKV
from tqcompile.centre import Centre, Centring

aten = torch.ops.aten


def run(func, args: tuple, kwargs: dict):
    """Run an ATen operator some of whose arguments are compressed, or decoded and read-only."""
    first = args[0] if args else None
    caches = first if func in _JOINS else (first,)
    if not any(isinstance(each, CompressedKV) and each.centre is not None for each in caches):
        return dispatch.run(func, args, kwargs)
    return _run(func, first, args, kwargs)


@torch.compiler.disable
def _run(func, first, args: tuple, kwargs: dict):
    if func in _WRITES:
        written = _WRITES[func](*args, **kwargs)
        return dispatch.run(aten.copy_.default if func in _FILLS else func, (first, *written), {})
    if func in _JOINS:
        return _JOINS[func](func, *args, **kwargs)
    centre = _MOVES[func](func, first, *args[1:], **kwargs) if func in _MOVES else None
    if centre is None:
        return dispatch.decoded(func, args, kwargs)
    result = dispatch.run(func, args, kwargs)
    if isinstance(result, CompressedKV):
        return result.centred(centre)
    return result


def fitted(cache: CompressedKV, centring: Centring | None) -> CompressedKV:
    """This cache, or a copy whose codes are encoded once more, as a graph reads it that centres so, or not at all."""
    if cache.centre is None:
        return cache if centring is None else cache.centred(centring.nothing(cache))
    if cache.centre.fits(centring):
        return cache
    again = CompressedKV.encode(cache, cache.codec)
    return fitted(again, centring)


def refit(cache: CompressedKV, centring: Centring | None) -> str | None:
    """Make the codes of a cache that is written in place what a graph reads that centres so.

    Returns why that cannot be: what shows the codes of this cache would not follow.
    """
    made = fitted(cache, centring)
    if made is not cache:
        if cache.others or cache.is_part or (cache.buffer is not None and cache.buffer.shared):
            return "a graph that does not centre its keys writes it, and others show it"
        cache.planes, cache.buffer, cache.start = made.planes, None, 0
        cache.centre, cache.recent = made.centre, None
    return None


def _kept(func, cache, *args, **kwargs) -> Centre:
    return cache.centre


def _copied(func, cache, *args, **kwargs) -> Centre:
    return replace(cache.centre, vectors=cache.centre.vectors.clone())


def _sliced(func, cache, dim=0, start=None, end=None, step=1) -> Centre | None:
    """Of sequences or heads, or of the first tokens."""
    dim %= cache.dim()
    if dim != cache.centre.dim:
        return replace(cache.centre, vectors=func(cache.centre.vectors, dim, start, end, step))
    return cache.centre if start in (None, 0) and step == 1 else None


def _selected(func, cache, dim, index) -> Centre | None:
    """Some of the sequences or heads, one by one."""
    dim %= cache.dim()
    return None if dim == cache.centre.dim else replace(cache.centre, vectors=func(cache.centre.vectors, dim, index))


def _indexed(func, cache, indices) -> Centre | None:
    """Sequences by an index of them alone."""
    lone = len(indices) == 1 and indices[0] is not None and indices[0].dim() == 1 and cache.centre.dim != 0
    return replace(cache.centre, vectors=func(cache.centre.vectors, indices)) if lone else None


def _repeated(func, cache, repeats) -> Centre | None:
    """All sequences several times."""
    lone = len(repeats) == cache.dim() and all(times == 1 for times in repeats[1:]) and cache.centre.dim != 0
    return replace(cache.centre, vectors=func(cache.centre.vectors, repeats)) if lone else None


def _copied_to(func, cache, *, device=None, **kwargs) -> Centre:
    return replace(cache.centre, vectors=cache.centre.vectors.to(device=device, copy=True))


_MOVES: dict[object, Callable] = {
    **dict.fromkeys((aten.detach.default, aten.alias.default, aten.lift_fresh.default), _kept),
    aten.clone.default: _copied,
    aten._to_copy.default: _copied_to,
    aten.slice.Tensor: _sliced,
    aten.index_select.default: _selected,
    aten.index.Tensor: _indexed,
    aten.repeat.default: _repeated,
}


def _dense(value: torch.Tensor) -> torch.Tensor:
    return value.decode() if isinstance(value, CompressedKV) else value


def _less(cache: CompressedKV, source: torch.Tensor, chosen: Callable, put: Callable) -> torch.Tensor:
    """What is left of a source for the places of a cache that `chosen` takes of a tensor as wide as that, and to which
    `put` writes into such a tensor."""
    centre = cache.centre
    if principal.has_basis(centre.vectors, centre.dim):
        # Each head has a basis of its own: where rows of several are picked out, all are turned first.
        whole = torch.zeros(cache.shape, dtype=cache.dtype, device=cache.device)
        put(whole)
        return chosen(centre.less(whole))
    slots = torch.arange(cache.shape[centre.dim], device=cache.device)
    taken, balance = (chosen(each.expand(cache.shape)) for each in (centre.at(slots), centre.balance))
    return ((_dense(source).float() - taken) / balance).to(cache.dtype)


def _write_copy(cache, source, non_blocking=False) -> tuple:
    return (_less(cache, source, lambda x: x, lambda x: x.copy_(_dense(source))),)


def _write_index_copy(cache, dim, index, source) -> tuple:
    if source.dtype != cache.dtype or dim % cache.dim() == cache.dim() - 1:
        return dim, index, source
    dense = _dense(source)
    chosen, put = (lambda x: x.index_select(dim, index)), (lambda x: x.index_copy_(dim, index, dense))
    return dim, index, _less(cache, dense, chosen, put)


def _write_index_put(cache, indices, values, accumulate=False) -> tuple:
    if len(indices) >= cache.dim() or accumulate:
        return indices, values, accumulate
    dense = _dense(values)
    chosen, put = (lambda x: aten.index.Tensor(x, indices)), (lambda x: aten.index_put_(x, indices, dense))
    return indices, _less(cache, dense, chosen, put)


def _write_fill(cache, value=0.0) -> tuple:
    return _write_copy(cache, torch.full(cache.shape[-1:], float(value), device=cache.device))


_FILLS = (aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor)

# What is to be written instead of the arguments behind the cache.
_WRITES: dict[object, Callable] = {
    aten.copy_.default: _write_copy,
    aten.index_copy_.default: _write_index_copy,
    aten.index_put_.default: _write_index_put,
    **dict.fromkeys(_FILLS, _write_fill),
}


def _cat(func, tensors, dim=0):
    """Tokens behind a centred cache are taken the same centre off; sequences beside it keep a centre of their own."""
    first, *others = tensors
    if not isinstance(first, CompressedKV) or first.centre is None:
        return dispatch.decoded(func, (tensors, dim), {})
    centre, dim = first.centre, dim % first.dim()
    if dim != centre.dim:
        alike = all(
            isinstance(each, CompressedKV) and each.centre is not None and each.codec is first.codec
            and each.centre.kind == centre.kind
            for each in others
        )  # fmt: skip
        if not alike or dim == first.dim() - 1:
            return dispatch.decoded(func, (tensors, dim), {})
        vectors = func([each.centre.vectors for each in tensors], dim)
        return dispatch.run(func, (tensors, dim), {}).centred(replace(centre, vectors=vectors))
    parts, start = [first], first.shape[dim]
    for part in map(_dense, others):
        parts.append(centre.less(part, centre.places(start, part)))
        start += part.shape[dim]
    return dispatch.run(func, (parts, dim), {}).centred(centre)


def _stack(func, tensors, dim=0):
    return dispatch.decoded(func, (tensors, dim), {})


_JOINS: dict[object, Callable] = {aten.cat.default: _cat, aten.stack.default: _stack}
