"""Append and attend for any codec, in plain PyTorch: the truth, and the path that runs on a CPU.

All of it works in the codec's own basis: a caller rotates x before `encode`, q before `attend`, and rotates the
result of `decode` and `attend` back (`rotate`, `rotate_back`). Nothing here materialises a decoded cache.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps

import torch

from tqcompile.codec import Codec
from tqcompile.coding import Planes, decode, encode
from tqcompile.recent import Exact
from tqcompile.scores import apply as scores_of

RowDecoder = Callable[[Codec, Planes, int], torch.Tensor]
RowEncoder = Callable[[Codec, torch.Tensor], Sequence[torch.Tensor]]

# Numbers in one decoded block of keys or of values: two megabytes of float32. Smaller ones fit a core's cache better
# and cost more calls.
BLOCK_ELEMENTS = 2**19


def as_stored(function: Callable) -> Callable:
    """`function` outside of `torch.autocast`, which would round scales and bases again: codes do not depend on it."""

    @wraps(function)
    def call(*args, **kwargs):
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return call


@as_stored
def rotate(x: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """x [..., head_dim] -> its coordinates in `basis` [coordinates, head_dim], in its dtype; None leaves x."""
    return x if basis is None else x.to(basis.dtype) @ basis.T


@as_stored
def rotate_back(y: torch.Tensor, basis: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Numbers y [..., coordinates] along the rows of `basis` -> their sum [..., head_dim], in `dtype`.

    The inverse of `rotate` where the basis is orthonormal.
    """
    return y.to(dtype) if basis is None else (y.to(basis.dtype) @ basis).to(dtype)


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


def shifted(waved: torch.Tensor, waves: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The additive mask of what centring takes off keys (`centre.waved`, `centre.waves`) and of a mask that is given.

    waved [B, Hq, T, columns + 1] and waves [S, columns] float32; mask None, or what `attend` takes. Returns
    [B, Hq, T, S] float32.
    """
    return beside(waved[..., :-1] @ waves.T + waved[..., -1:], mask)


def beside(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The additive mask of scores [B, Hq, T, S] that come beside others, and of a mask that is given (None, or what
    `attend` takes)."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


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

    q [B, Hq, T, coordinates] in the key basis; planes [B, Hkv, S, width]; `score_mod` is a text of `scores`; mask
    broadcasts to [B, Hq, T, S], bool (True keeps) or additive; `causal` keeps key s for query t where s <= t, as SDPA
    does; `sinks` [B, Hq, T, 1] are logits of one more token each, whose value is zero. Returns [B, Hq, T, coordinates]
    in the value basis, float32. A query that may see nothing gets zeros.
    """
    how = mask, causal, scale, key_codec, value_codec, head_dims, score_mod, sinks
    return attend_beside(q, keys, values, *how, None, row_decoder)[0]


def attend_beside(
    q: torch.Tensor,
    keys: Planes,
    values: Planes,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    key_codec: Codec,
    value_codec: Codec,
    head_dims: tuple[int, int],
    score_mod: str,
    sinks: torch.Tensor | None,
    exact: Exact | None,
    row_decoder: RowDecoder = decode,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend` where the exact numbers of some tokens take the place of their codes.

    Returns what codes add, and what those add, float32 in the model's basis; their sum is attention once the first is
    rotated back.
    """
    batch, heads, queries, _ = q.shape
    length = keys[0].shape[2]
    if batch * heads * queries * length <= 2 * BLOCK_ELEMENTS:
        scores = logits(q.float() * scale, keys, key_codec, head_dims[0], row_decoder)
        weights = softmax(scores, mask, causal, score_mod, sinks, exact, scale)
        out = mix(weights[..., :length], values, value_codec, head_dims[1], row_decoder)
        return out, None if exact is None else exact.mixed(weights[..., length:])
    others = key_codec, value_codec, head_dims, score_mod, sinks, row_decoder, exact
    return _attend_online(q, keys, values, mask, causal, scale, *others)


def softmax(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    score_mod: str = "",
    sinks: torch.Tensor | None = None,
    exact: Exact | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Softmax of scores [B, Hq, T, S] over the keys a query may see, with zeros where it may see none of them.

    With `exact` its weights come behind the others, [B, Hq, T, S + r], and the codes of its tokens have none.
    """
    scores = masked(scores_of(score_mod, scores), mask, causal, scores.shape, 0, scores.shape[-1])
    if exact is not None:
        theirs = exact_scores(exact, mask, causal, scale, score_mod)
        scores = torch.cat([scores.index_fill(-1, exact.places, -math.inf), theirs], -1)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)
    if mask is not None or causal or sinks is not None:
        weights = torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, weights)
    return weights if sinks is None else weights[..., :-1]


def exact_scores(exact: Exact, mask: torch.Tensor | None, causal: bool, scale: float, score_mod: str) -> torch.Tensor:
    """Scores [B, Hq, T, r] of the exact tokens, which see what their codes would."""
    batch, heads, queries, width = exact.q.shape
    rows = (exact.q.float() * scale).reshape(batch, exact.keys.shape[1], -1, width)
    scores = scores_of(score_mod, (rows @ exact.keys.float().mT).view(batch, heads, queries, -1))
    if mask is not None and mask.shape[-1] != 1:
        mask = mask.index_select(-1, exact.places)
    scores = masked(scores, mask, False, scores.shape, 0, scores.shape[-1])
    if causal:
        query = torch.arange(queries, device=scores.device).unsqueeze(-1)
        scores = scores.masked_fill(exact.places > query, -math.inf)
    return scores


def _attend_online(
    q, keys, values, mask, causal, scale, key_codec, value_codec, head_dims, score_mod, sinks, row_decoder, exact
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
    state = peak, total, rows.new_zeros(*rows.shape[:3], value_codec.coordinates(head_dims[1]))
    shape, hidden = (batch, query_heads, queries, length), None
    if exact is not None:
        hidden = torch.zeros(length, dtype=torch.bool, device=q.device).index_fill(0, exact.places, True)
    for start, stop in _blocks(keys, max(head_dims)):
        key = row_decoder(key_codec, [plane[:, :, start:stop] for plane in keys], head_dims[0])
        scores = scores_of(score_mod, rows @ key.float().transpose(-1, -2))
        scores = masked(scores, mask, causal, shape, start, stop)
        if hidden is not None:
            scores = scores.masked_fill(hidden[start:stop], -math.inf)
        state, weights = _folded(state, scores)
        value = row_decoder(value_codec, [plane[:, :, start:stop] for plane in values], head_dims[1])
        state[2].add_(weights @ value.float())
    theirs = None
    if exact is not None:
        scores = exact_scores(exact, mask, causal, scale, score_mod)
        state, weights = _folded(state, scores.reshape(*rows.shape[:3], -1))
        whole = state[1].view(*shape[:3], 1)
        theirs = torch.where(whole == 0, 0.0, exact.mixed(weights.view_as(scores)) / whole)
    _, total, out = state
    return torch.where(total == 0, 0.0, out / total).reshape(batch, query_heads, queries, -1), theirs


def _folded(state: tuple[torch.Tensor, ...], scores: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Peak, total and sums of a running softmax before the values of one more block, and the weights of these."""
    peak, total, out = state
    new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
    pivot = torch.where(new_peak == -math.inf, 0.0, new_peak)
    weights, rescale = (scores - pivot).exp(), (peak - pivot).exp()
    return (new_peak, total * rescale + weights.sum(-1, keepdim=True), out * rescale), weights


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
    """q [B, Hq, T, coordinates] in the key basis times keys [B, Hkv, S, width] -> [B, Hq, T, S], float32."""
    batch, query_heads, queries, _ = q.shape
    kv_heads, length = keys[0].shape[1], keys[0].shape[2]
    rows = q.float().reshape(batch, kv_heads, -1, q.shape[-1])
    out = rows.new_empty(batch, kv_heads, rows.shape[2], length)
    for start, stop in _blocks(keys, head_dim):
        key = row_decoder(codec, [plane[:, :, start:stop] for plane in keys], head_dim)
        out[..., start:stop] = rows @ key.float().transpose(-1, -2)
    return out.view(batch, query_heads, queries, length)


def mix(
    weights: torch.Tensor, values: Planes, codec: Codec, head_dim: int, row_decoder: RowDecoder = decode
) -> torch.Tensor:
    """weights [B, Hq, T, S] times values [B, Hkv, S, width] -> [B, Hq, T, coordinates] in their basis, float32."""
    batch, query_heads, queries, length = weights.shape
    kv_heads, coordinates = values[0].shape[1], codec.coordinates(head_dim)
    rows = weights.float().reshape(batch, kv_heads, query_heads // kv_heads * queries, length)
    out = rows.new_zeros(batch, kv_heads, rows.shape[2], coordinates)
    for start, stop in _blocks(values, head_dim):
        value = row_decoder(codec, [plane[:, :, start:stop] for plane in values], head_dim)
        out += rows[..., start:stop] @ value.float()
    return out.view(batch, query_heads, queries, coordinates)


def _blocks(planes: Planes, head_dim: int):
    batch, heads, length = planes[0].shape[:3]
    most = max(64, BLOCK_ELEMENTS // max(1, batch * heads * head_dim))
    # Even parts: a last block of a few tokens would cost as much to call as a full one.
    block = -(-length // max(1, -(-length // most)))
    return [(start, min(start + block, length)) for start in range(0, length, block or 1)]
