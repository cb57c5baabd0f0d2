"""Encode, decode and attend for any codec, in plain PyTorch: the truth, and the path that runs on a CPU.

All of it works in the codec's own basis: a caller rotates x before `encode`, q before `attend`, and rotates the
result of `decode` and `attend` back (`rotate`, `rotate_back`). Nothing here materialises a decoded cache.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps

import torch

from tqcompile import tables
from tqcompile.codec import Codec, Lookup
from tqcompile.layout import PlaneLayout, layout_of
from tqcompile.scores import apply as scores_of

Planes = Sequence[torch.Tensor]
RowDecoder = Callable[[Codec, Planes, int], torch.Tensor]
RowEncoder = Callable[[Codec, torch.Tensor], Sequence[torch.Tensor]]

# Numbers in one decoded block of keys or of values: two megabytes of float32. Smaller ones fit a core's cache better
# and cost more calls.
BLOCK_ELEMENTS = 2**19


def as_stored(function: Callable) -> Callable:
    """`function` outside of `torch.autocast`, which would round scales and bases again: codes do not depend on it."""

    @wraps(function)
    def call(*args):
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)

    return call


@as_stored
def rotate(x: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """x [..., head_dim] -> its coordinates in `basis` (rows of [head_dim, head_dim]), in its dtype; None leaves x."""
    return x if basis is None else x.to(basis.dtype) @ basis.T


@as_stored
def rotate_back(y: torch.Tensor, basis: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `rotate`, in `dtype`."""
    return y.to(dtype) if basis is None else (y.to(basis.dtype) @ basis).to(dtype)


def encode(codec: Codec, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y [..., head_dim] in the codec's basis -> its planes [..., width], in the codec's order of planes.

    A token that holds NaN or Inf, or whose scale is beyond float16, gets a non-finite scale: it decodes to
    non-finite numbers, and no other token's codes depend on it.
    """
    return _ENCODERS[codec.fit](codec, y)


def _encode_exact(codec: Codec, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (y,)


def _encode_absmax(codec: Codec, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    head_dim, block = y.shape[-1], codec.scale.plane.per
    limit = 2 ** (codec.codes.plane.bits - 1) - 1
    scales, codes = [], []
    # Blocks one by one, not padded and folded: Inductor miscompiles the ragged last block of the folded form.
    for start in range(0, head_dim, block):
        part = y[..., start : start + block].float()
        scale = (part.abs().amax(-1, keepdim=True) / limit).half()
        step = scale.float()
        code = torch.where(step > 0, part / step, 0.0).round().nan_to_num(0.0).clamp(-limit, limit)
        scales.append(scale)
        codes.append(code.to(torch.int32))
    return _in_order(codec, y, torch.cat(scales, -1), torch.cat(codes, -1))


def _encode_sphere(codec: Codec, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = y.float()
    head_dim = y.shape[-1]
    codebook = tables.numbers(codec.codes, head_dim)
    peak = y.abs().amax(-1, keepdim=True)
    shape = torch.where(peak > 0, y / peak, 0.0)
    size = (shape * shape).sum(-1, keepdim=True).sqrt()
    unit = torch.where(size > 0, shape / size, 0.0) * math.sqrt(head_dim)
    edges = torch.tensor(tables.boundaries(codebook), dtype=torch.float32, device=y.device)
    codes = torch.bucketize(unit, edges)
    fitted = (unit * lookup(codec.codes, codes, head_dim)).sum(-1, keepdim=True) * tables.unit(codec.codes, head_dim)
    # |x|^2 / <x, c> with x = peak * size / sqrt(head_dim) * unit: no square of a large norm is formed.
    scale = peak * torch.where(size > 0, size, 1.0) * math.sqrt(head_dim) / fitted
    scale = torch.where(peak == 0, 0.0, scale)
    return _in_order(codec, y, scale.half(), codes)


_ENCODERS = {"exact": _encode_exact, "absmax": _encode_absmax, "sphere": _encode_sphere}


def _in_order(codec: Codec, y: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    layout = layout_of(codec, y.shape[-1], torch.float32, y.device.type)
    packed = layout.plane(codec.codes.plane.name).pack(codes)
    return tuple(packed if plane is codec.codes.plane else scale for plane in codec.planes)


def lookup(factor: Lookup, codes: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Codes [...] -> numbers [...], float32, in units of `tables.unit`."""
    if factor.table == "signed":
        limit = 2 ** (factor.plane.bits - 1)
        return ((codes ^ limit) - limit).float()
    coefficients = tables.polynomial(factor, head_dim)
    if coefficients is None:
        return torch.tensor(tables.numbers(factor, head_dim), dtype=torch.float32, device=codes.device)[codes]
    size = tables.unit(factor, head_dim)
    x = codes.float() - (2**factor.plane.bits - 1) / 2
    square, number = x * x, coefficients[-1] / size
    for coefficient in reversed(coefficients[:-1]):
        number = number * square + coefficient / size
    return number * x if tables.integers(factor, head_dim) is None else (number * x).round()


def decode(codec: Codec, planes: Planes, head_dim: int) -> torch.Tensor:
    """Planes [..., width] -> coordinates [..., head_dim] in the codec's basis, float32 (`identity`: its own dtype)."""
    if codec.fit == "exact":
        return planes[0]
    return torch.cat([numbers for _, numbers in pieces(codec, planes, head_dim)], -1)


def pieces(
    codec: Codec, planes: Planes, head_dim: int, runs: Callable = PlaneLayout.pieces
) -> list[tuple[slice, torch.Tensor]]:
    """What `decode` makes, as runs of neighbouring coordinates: (coordinates, float32 [..., run])."""
    codes, scale = split(codec, planes)
    layout = layout_of(codec, head_dim, torch.float32, codes.device.type).plane(codec.codes.plane.name)
    scale, block = scale.float() * tables.unit(codec.codes, head_dim), codec.scale.plane.per or head_dim
    found = []
    for coordinates, code in runs(layout, codes):
        number = lookup(codec.codes, code, head_dim)
        edges = [coordinates.start, *range(-(-(coordinates.start + 1) // block) * block, coordinates.stop, block)]
        for start, stop in zip(edges, [*edges[1:], coordinates.stop]):
            part = number[..., start - coordinates.start : stop - coordinates.start]
            found.append((slice(start, stop), part * scale[..., start // block : start // block + 1]))
    return found


def split(codec: Codec, planes: Planes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The planes of codes and of scale out of a codec's planes; scale is None where the codec has none."""
    named = dict(zip((plane.name for plane in codec.planes), planes))
    return named[codec.codes.plane.name], named[codec.scale.plane.name] if codec.scale else None


def append(
    codec: Codec, planes: Planes, y: torch.Tensor, positions: torch.Tensor | None, row_encoder: RowEncoder = encode
) -> None:
    """Encode y [A, B, T, head_dim] and write it into planes [A, B, S, width], in place.

    `positions` int64 [T] are places along S; None means that y fills the planes (T == S).

    Raises:
        IndexError, RuntimeError: a position outside the planes, as an indexed write to a dense tensor would.
    """
    for plane, code in zip(planes, row_encoder(codec, y)):
        if positions is None:
            plane.copy_(code)
        else:
            plane.index_copy_(2, positions, code.to(plane.dtype))


def attend(
    q: torch.Tensor,
    keys: Planes,
    values: Planes,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    key_codec: Codec,
    value_codec: Codec,
    head_dims: tuple[int, int],
    score_mod: str = "",
    sinks: torch.Tensor | None = None,
    row_decoder: RowDecoder = decode,
) -> torch.Tensor:
    """Attention over compressed keys and values, which are decoded one block of tokens at a time.

    q [B, Hq, T, D] in the key basis; planes [B, Hkv, S, width]; `score_mod` is a text of `scores`; mask broadcasts to
    [B, Hq, T, S], bool (True keeps) or additive; `causal` keeps key s for query t where s <= t, as SDPA does; `sinks`
    [B, Hq, T, 1] are logits of one more token each, whose value is zero. Returns [B, Hq, T, Dv] in the value basis,
    float32. A query that may see nothing gets zeros.
    """
    batch, heads, queries, _ = q.shape
    length = keys[0].shape[2]
    if batch * heads * queries * length <= 2 * BLOCK_ELEMENTS:
        scores = logits(q.float() * scale, keys, key_codec, head_dims[0], row_decoder)
        weights = softmax(scores, mask, causal, score_mod, sinks)
        return mix(weights, values, value_codec, head_dims[1], row_decoder)
    others = key_codec, value_codec, head_dims, score_mod, sinks, row_decoder
    return _attend_online(q, keys, values, mask, causal, scale, *others)


def softmax(
    scores: torch.Tensor, mask: torch.Tensor | None, causal: bool, score_mod: str = "", sinks=None
) -> torch.Tensor:
    """Softmax of scores [B, Hq, T, S] over the keys a query may see, with zeros where it may see none of them."""
    scores = masked(scores_of(score_mod, scores), mask, causal, scores.shape, 0, scores.shape[-1])
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)
    if mask is not None or causal or sinks is not None:
        weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, weights)
    return weights if sinks is None else weights[..., :-1]


def _attend_online(
    q, keys, values, mask, causal, scale, key_codec, value_codec, head_dims, score_mod, sinks, row_decoder
):
    """`attend` where the scores of all keys would not fit in cache: a running softmax over blocks of keys."""
    batch, query_heads, queries, _ = q.shape
    kv_heads, length = keys[0].shape[1], keys[0].shape[2]
    rows = (q.float() * scale).reshape(batch, kv_heads, -1, q.shape[-1])
    peak = rows.new_full((*rows.shape[:3], 1), -math.inf)
    total = torch.zeros_like(peak)
    if sinks is not None:
        peak = sinks.float().expand(batch, query_heads, queries, 1).reshape(peak.shape)
        total = torch.ones_like(peak)
    out = rows.new_zeros(*rows.shape[:3], head_dims[1])
    for start, stop in _blocks(keys, max(head_dims)):
        key = row_decoder(key_codec, [plane[:, :, start:stop] for plane in keys], head_dims[0])
        scores = scores_of(score_mod, rows @ key.float().transpose(-1, -2))
        scores = masked(scores, mask, causal, (batch, query_heads, queries, length), start, stop)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        pivot = torch.where(new_peak == -math.inf, 0.0, new_peak)
        weights = (scores - pivot).exp()
        rescale = (peak - pivot).exp()
        value = row_decoder(value_codec, [plane[:, :, start:stop] for plane in values], head_dims[1])
        out = out * rescale + weights @ value.float()
        total = total * rescale + weights.sum(-1, keepdim=True)
        peak = new_peak
    out = torch.where(total == 0, 0.0, out / total)
    return out.reshape(batch, query_heads, queries, head_dims[1])


def masked(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    shape: tuple[int, int, int, int],
    start: int,
    stop: int,
) -> torch.Tensor:
    """Scores [B, Hkv, G*T, stop - start] or [B, Hq, T, ...] of keys start..stop, masked by [B, Hq, T, S]."""
    batch, heads, queries, _ = shape
    if mask is None and not causal:
        return scores
    full = scores.reshape(batch, heads, queries, stop - start)
    if causal:
        position = torch.arange(queries, device=scores.device).unsqueeze(-1)
        full = full.masked_fill(torch.arange(start, stop, device=scores.device) > position, -math.inf)
    if mask is not None:
        part = mask if mask.shape[-1] == 1 else mask[..., start:stop]
        full = full.masked_fill(~part, -math.inf) if mask.dtype == torch.bool else full + part
    return full.reshape(scores.shape)


def logits(
    q: torch.Tensor, keys: Planes, codec: Codec, head_dim: int, row_decoder: RowDecoder = decode
) -> torch.Tensor:
    """q [B, Hq, T, D] in the key basis times compressed keys [B, Hkv, S, width] -> [B, Hq, T, S], float32."""
    batch, query_heads, queries, _ = q.shape
    kv_heads, length = keys[0].shape[1], keys[0].shape[2]
    rows = q.float().reshape(batch, kv_heads, -1, head_dim)
    out = rows.new_empty(batch, kv_heads, rows.shape[2], length)
    for start, stop in _blocks(keys, head_dim):
        key = row_decoder(codec, [plane[:, :, start:stop] for plane in keys], head_dim)
        out[..., start:stop] = rows @ key.float().transpose(-1, -2)
    return out.view(batch, query_heads, queries, length)


def mix(
    weights: torch.Tensor, values: Planes, codec: Codec, head_dim: int, row_decoder: RowDecoder = decode
) -> torch.Tensor:
    """weights [B, Hq, T, S] times compressed values [B, Hkv, S, width] -> [B, Hq, T, D] in their basis, float32."""
    batch, query_heads, queries, length = weights.shape
    kv_heads = values[0].shape[1]
    rows = weights.float().reshape(batch, kv_heads, query_heads // kv_heads * queries, length)
    out = rows.new_zeros(batch, kv_heads, rows.shape[2], head_dim)
    for start, stop in _blocks(values, head_dim):
        value = row_decoder(codec, [plane[:, :, start:stop] for plane in values], head_dim)
        out += rows[..., start:stop] @ value.float()
    return out.view(batch, query_heads, queries, head_dim)


def _blocks(planes: Planes, head_dim: int):
    batch, heads, length = planes[0].shape[:3]
    most = max(64, BLOCK_ELEMENTS // max(1, batch * heads * head_dim))
    # Even parts: a last block of a few tokens would cost as much to call as a full one.
    block = -(-length // max(1, -(-length // most)))
    return [(start, min(start + block, length)) for start in range(0, length, block or 1)]
