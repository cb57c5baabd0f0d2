"""Eager writes into a compressed cache: whole tokens, which are encoded first."""

from collections.abc import Callable

import torch

from tqcompile.cache import CompressedKV, encode_dense
from tqcompile.layout import along_plane

aten = torch.ops.aten

ADVICE = "write whole tokens (index_copy_, copy_, an indexed assignment), or work on cache.decode()"


def check_writable(func, cache: CompressedKV) -> None:
    if cache.copied:
        raise RuntimeError(f"{func} writes into a view of a compressed cache whose tokens do not lie so; {ADVICE}")
    if cache.buffer is not None and cache.buffer.shared:
        raise RuntimeError(
            f"{func} writes into a compressed cache that another continues or shows; clone() it first, and write there"
        )


def planes_alike(cache: CompressedKV, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Planes of `value` in the codec of `cache`."""
    if isinstance(value, CompressedKV):
        same = value.codec is cache.codec and value.shape[-1] == cache.shape[-1]
        if same and (not cache.codec.is_exact or value.dtype == cache.dtype):
            return value.planes
        value = value.decode()
    if value.shape[-1:] != cache.shape[-1:]:
        value = value.expand(*value.shape[:-1], cache.shape[-1])
    return encode_dense(value.to(cache.dtype), cache.codec)


def leading(cache: torch.Tensor, dim: int) -> int | None:
    """`dim` counted from the front, or None where it is the compressed one, or none at all."""
    return dim % cache.dim() if -cache.dim() <= dim < cache.dim() and dim % cache.dim() < cache.dim() - 1 else None


def whole_tokens(cache: CompressedKV, indices) -> bool:
    masks = (torch.bool, torch.uint8)
    return sum(1 if index is None or index.dtype not in masks else index.dim() for index in indices) < cache.dim()


def names_tokens(cache: CompressedKV, index: torch.Tensor) -> bool:
    """Whether an index of `gather` or `scatter_` is one number for all channels of a token, as it was expanded."""
    return index.dim() == cache.dim() and index.shape[-1] == cache.shape[-1] and index.stride(-1) == 0


def _write_copy(cache, source, non_blocking=False):
    for plane, code in zip(cache.planes, planes_alike(cache, source)):
        plane.copy_(code)


def _write_index_copy(cache, dim, index, source):
    axis = leading(cache, dim)
    if axis is None:
        raise RuntimeError("index_copy_ along head_dim would re-encode every token of a compressed cache; decode() it")
    if source.dtype != cache.dtype:
        raise RuntimeError(f"index_copy_: the cache is {cache.dtype} and the source is {source.dtype}; cast the source")
    for plane, code in zip(cache.planes, planes_alike(cache, source)):
        plane.index_copy_(axis, index, code)


def _write_index_put(cache, indices, values, accumulate=False):
    if accumulate or not whole_tokens(cache, indices):
        raise RuntimeError("only whole tokens can be assigned to a compressed cache, and not accumulated; decode() it")
    for plane, code in zip(cache.planes, planes_alike(cache, values)):
        aten.index_put_.default(plane, indices, code)


def _write_scatter(cache, dim, index, source):
    axis = leading(cache, dim)
    if axis is None or not names_tokens(cache, index) or source.dtype != cache.dtype or source.shape != index.shape:
        raise RuntimeError(
            "scatter_ can write tokens into a compressed cache that are of its dtype, by an index of their size that "
            f"was expanded over head_dim; {ADVICE}"
        )
    for plane, code in zip(cache.planes, planes_alike(cache, source)):
        plane.scatter_(axis, along_plane(index, plane), code)


def _write_zero(cache):
    torch._foreach_zero_(cache.planes)


def _write_fill(cache, value):
    _write_copy(cache, torch.full(cache.shape[-1:], float(value), dtype=cache.dtype, device=cache.device))


WRITES: dict[object, Callable] = {
    aten.copy_.default: _write_copy,
    aten.index_copy_.default: _write_index_copy,
    aten.index_put_.default: _write_index_put,
    aten.scatter_.src: _write_scatter,
    aten.zero_.default: _write_zero,
    aten.fill_.Scalar: _write_fill,
    aten.fill_.Tensor: _write_fill,
}
