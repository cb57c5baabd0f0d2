"""Tokens that a cache keeps as they are: put into their slots, hidden from what reads codes, and read beside it.

`read_scores` is printed by `emit` for a reader. A token has one slot, so whether a slot holds it is one look.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl

from tqcompile import recent
from tqcompile.kernels import emit, launcher, tune
from tqcompile.kernels.combine import Sizes, maximum_of, sum_of
from tqcompile.kernels.emit import Reader

# Printed by `emit`; the name stands here so that the skeleton can be read, and checked, as ordinary Python.
read_scores = None

BLOCK_NUMBERS = 2048
HIDDEN_TOKENS = 1024
# Tokens that one program puts into their slots; more are what a prefill writes.
MOST_TOKENS = 64


@triton.jit
def slot_of(place, sinks, window):
    """The slot of tokens: of the first ones their place, and one of a ring for the others."""
    return tl.where(place < sinks, place, sinks + (place - sinks) % tl.maximum(window, 1))


@triton.jit(do_not_specialize=["length", "sinks", "window"])
def hide_tokens(
    mask, key_index, value_index, out, length, sinks, window, mask_s, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = token < length
    slot = slot_of(token, sinks, window)
    there = valid & (slot < sinks + window)
    held = tl.load(key_index + slot, mask=there, other=-1) == token
    held &= tl.load(value_index + slot, mask=there, other=-1) == token
    if KIND == "none":
        kept = tl.where(held, 0, 1)
    else:
        kept = tl.load(mask + row * (length if mask_s else 1) + token * mask_s, mask=valid, other=0)
        kept = tl.where(held, 0, kept) if KIND == "bool" else tl.where(held, float("-inf"), kept.to(tl.float32))
    tl.store(out + row * length + token, kept.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["length", "slots"])
def hide_slots(mask, key_index, value_index, length, slots, BLOCK: tl.constexpr):
    slot = tl.arange(0, BLOCK)
    token = tl.load(key_index + slot, mask=slot < slots, other=-1)
    held = (token == tl.load(value_index + slot, mask=slot < slots, other=-1)) & (token >= 0) & (token < length)
    tl.store(mask + tl.program_id(0).to(tl.int64) * length + token, float("-inf"), mask=held)


# fmt: off
@triton.jit(do_not_specialize=["scale", "groups", "queries", "length", "slots"])
def attend_exact(
    q, keys, key_index, values, value_index, mask, out, peaks, totals,
    scale, kv_heads, groups, queries, length, slots,
    q_b, q_h, q_t, q_d, key_b, key_h, key_s, value_b, value_h, value_s, mask_b, mask_h, mask_t, mask_s,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < groups * queries
    query = row % queries
    query_head = head * groups + row // queries
    k, v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    address = q + batch * q_b + query_head[:, None] * q_h + query.to(tl.int64)[:, None] * q_t + k[None, :] * q_d
    asked = tl.load(address, mask=real[:, None] & (k < KEY_DIM)[None, :], other=0.0).to(tl.float32)
    mask_row = batch * mask_b + query_head * mask_h + query.to(tl.int64) * mask_t
    keys += batch * key_b + head * key_h
    values += batch * value_b + head * value_h

    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.full([BLOCK_R], 0.0, tl.float32)
    mixed = tl.full([BLOCK_R, BLOCK_V], 0.0, tl.float32)
    for start in range(0, slots, BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)
        token = tl.load(key_index + slot, mask=slot < slots, other=-1)
        same = token == tl.load(value_index + slot, mask=slot < slots, other=-1)
        valid = same & (token >= 0) & (token < length)
        inside = valid[:, None] & (k < KEY_DIM)[None, :]
        key = tl.load(keys + slot[:, None] * key_s + k[None, :], mask=inside, other=0.0).to(tl.float32)
        scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        scores = read_scores(scores, mask, mask_row, mask_s, query, token, real[:, None] & valid[None, :])
        new_peak = tl.maximum(peak, maximum_of(scores, 1))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - pivot[:, None])
        rescale = tl.exp(peak - pivot)
        total = total * rescale + sum_of(weights, 1)
        peak = new_peak
        inside = valid[:, None] & (v < VALUE_DIM)[None, :]
        value = tl.load(values + slot[:, None] * value_s + v[None, :], mask=inside, other=0.0).to(tl.float32)
        mixed = tl.dot(weights, value, mixed * rescale[:, None], input_precision="ieee")

    place = tl.program_id(0).to(tl.int64) * (groups * queries) + row
    tl.store(out + place[:, None] * VALUE_DIM + v[None, :], mixed, mask=real[:, None] & (v < VALUE_DIM)[None, :])
    tl.store(peaks + place, peak, mask=real)
    tl.store(totals + place, total, mask=real)


@triton.jit(do_not_specialize=["start", "count", "sinks", "window"])
def remember_tokens(
    numbers, index, tokens, positions, start, count, sinks, window, columns,
    number_a, number_b, number_s, token_a, token_b, token_t, token_d,
    DIM: tl.constexpr, POSITIONED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    valid = t < count
    place = start + t.to(tl.int64)
    if POSITIONED:
        place = tl.load(positions + t, mask=valid, other=0)
    last = maximum_of(tl.where(valid, place, -1), 0)
    slot = slot_of(place, sinks, window)
    kept = valid & ((place < sinks) | (place > last - window))
    row = tl.program_id(0)
    if row == 0:
        first = -maximum_of(tl.where(valid, -place, -last), 0)
        every = tl.arange(0, BLOCK_S)
        held = tl.load(index + every, mask=every < sinks + window, other=-1)
        tl.store(index + every, tl.where((held >= first) & (held <= last), -1, held), mask=every < sinks + window)
        tl.debug_barrier()
        tl.store(index + slot, place, mask=kept)
    a, b = (row // columns).to(tl.int64), (row % columns).to(tl.int64)
    inside = kept[:, None] & (d < DIM)[None, :]
    source = tokens + a * token_a + b * token_b + t.to(tl.int64)[:, None] * token_t + d[None, :] * token_d
    target = numbers + a * number_a + b * number_b + slot[:, None] * number_s + d[None, :]
    tl.store(target, tl.load(source, mask=inside, other=0.0).to(numbers.dtype.element_ty), mask=inside)
# fmt: on


def block_of(head_dim: int) -> int:
    """Slots that are read at once: as many as fit registers beside the sums of 16 rows."""
    return max(16, BLOCK_NUMBERS // tune.extent(head_dim))


def source(reader: Reader) -> str:
    """The text of the module that all of this file launches."""
    kernels = (maximum_of, sum_of, slot_of, hide_tokens, hide_slots, attend_exact, remember_tokens)
    return emit.module_text("Tokens that a cache keeps as they are.", (emit.score_helper(reader),), kernels)


@cache
def module(reader: Reader, folder: str | None, interpreted: bool) -> ModuleType:
    """The imported module of `source`."""
    return emit.build(source(reader), folder, interpreted)


def remember(
    numbers: torch.Tensor,
    index: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor | None,
    start: int,
    dim: int,
    sinks: int,
    folder: str | None = None,
) -> None:
    """`recent.remember` of caches of three and four dimensions, in one launch where few tokens are written."""
    count = tokens.shape[dim]
    if not 0 < count <= MOST_TOKENS or not 3 <= numbers.dim() <= 4:
        recent.remember(numbers, index, tokens, positions, start, dim, sinks)
        return
    sides = [side.movedim(dim, -2) for side in (numbers, tokens)]
    numbers, tokens = sides if numbers.dim() == 4 else [side.unsqueeze(0) for side in sides]
    slots, width = index.shape[0] - 1, numbers.shape[-1]
    built = module(Reader(), folder, numbers.device.type == "cpu")
    launcher.launch(
        built,
        "remember_tokens",
        (numbers.shape[0] * numbers.shape[1],),
        (numbers, index, tokens, index if positions is None else positions),
        (start, count, sinks, slots - sinks, numbers.shape[1], *numbers.stride()[:3], *tokens.stride()),
        (width, positions is not None, *map(triton.next_power_of_2, (count, slots, width))),
        num_warps=4,
    )


def hidden(
    mask: torch.Tensor | None,
    exact: Sequence[torch.Tensor],
    length: int,
    sinks: int,
    folder: str | None,
    owned: bool = False,
) -> torch.Tensor:
    """`mask` that also hides what slots hold of keys and of values from what reads codes; bool where there is none.

    An `owned` mask, of contiguous float32 for each token, is written itself.
    """
    if owned:
        index, slots = exact[1], exact[1].shape[0] - 1
        built = module(Reader(), folder, index.device.type == "cpu")
        block = triton.next_power_of_2(max(1, slots))
        grid, tensors = (mask[..., 0].numel(),), (mask, index, exact[3])
        launcher.launch(built, "hide_slots", grid, tensors, (length, slots), (block,), num_warps=1)
        return mask
    index, kind = exact[1], "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    sizes = (1, 1, 1) if mask is None else mask.shape[:-1]
    out = torch.empty((*sizes, length), dtype=torch.bool if mask is None else mask.dtype, device=index.device)
    given = out if mask is None else mask.contiguous()
    built = module(Reader(), folder, index.device.type == "cpu")
    launcher.launch(
        built,
        "hide_tokens",
        (out[..., 0].numel(), -(-length // HIDDEN_TOKENS)),
        (given, index, exact[3], out),
        (length, sinks, index.shape[0] - 1 - sinks, 0 if given.shape[-1] == 1 else 1),
        (kind, HIDDEN_TOKENS),
        num_warps=4,
    )
    return out


def attend(q, exact, mask, scale: float, kv_heads: int, length: int, reader: Reader, folder: str | None):
    """What attention over those tokens leaves of each row: sums [heads, 1, rows, D] of values, peaks and totals, flat.

    q [B, Hq, T, D] in the model's basis, any strides; `mask` is None or a mask [B, Hq, T, length] and its strides.
    """
    keys, key_index, values, value_index = exact
    batch, query_heads, queries, key_dim = q.shape
    groups, value_dim = query_heads // kv_heads, values.shape[-1]
    rows = groups * queries
    left = Sizes(batch * kv_heads, 1, rows, value_dim).parts(q)
    part, strides = mask if mask is not None else (q, (0, 0, 0, 0))
    sizes = scale, kv_heads, groups, queries, length, key_index.shape[0] - 1
    launcher.launch(
        module(reader, folder, q.device.type == "cpu"),
        "attend_exact",
        (batch * kv_heads, -(-rows // 16)),
        (q, keys, key_index, values, value_index, part, *left),
        (*sizes, *q.stride(), *keys.stride()[:3], *values.stride()[:3], *strides),
        (key_dim, value_dim, 16, block_of(max(key_dim, value_dim)), tune.extent(key_dim), tune.extent(value_dim)),
        num_warps=4,
    )
    return left
