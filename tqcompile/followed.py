"""What eager code leaves of the tokens that a cache keeps as they are: all of them in what shows or copies the first
tokens, or reorders whole sequences, and none where it writes."""

from collections.abc import Callable

import torch

from tqcompile import centred
from tqcompile.cache import CompressedKV

aten = torch.ops.aten

_WRITES = (
    aten.copy_.default,
    aten.index_copy_.default,
    aten.index_put_.default,
    aten.scatter_.src,
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.fill_.Tensor,
)


@torch.compiler.disable
def run(func, args: tuple, kwargs: dict):
    """Run an ATen operator some of whose arguments are compressed, and say what its result keeps."""
    first, result = args[0] if args else None, centred.run(func, args, kwargs)
    if not isinstance(first, CompressedKV):
        return result
    if func in _WRITES:
        for cache in (first, *(other() for other in first.others)):
            if cache.recent is not None:
                cache.recent.void()
    elif func in _FOLLOWED and first.recent is not None and isinstance(result, CompressedKV):
        result.recent = _FOLLOWED[func](first, *args[1:], **kwargs)
    return result


def _shown(cache: CompressedKV, **kwargs):
    return cache.recent


def _sliced(cache: CompressedKV, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1):
    """An entry of a token behind those that a view shows says nothing of it."""
    dim = dim % cache.dim()
    whole = dim == cache.recent.regions.dim or stop is None or stop >= cache.shape[dim]
    return cache.recent if whole and not start and step == 1 else None


def _copied(cache: CompressedKV, **kwargs):
    return cache.recent.copy(cache.shape[cache.recent.regions.dim])


def _selected(cache: CompressedKV, dim: int, index: torch.Tensor):
    dim = dim % cache.dim()
    return None if dim == cache.recent.regions.dim else cache.recent.selected(dim, index)


_FOLLOWED: dict[object, Callable] = {
    aten.detach.default: _shown,
    aten.alias.default: _shown,
    aten.lift_fresh.default: _shown,
    aten.slice.Tensor: _sliced,
    aten.clone.default: _copied,
    aten.index_select.default: _selected,
}
