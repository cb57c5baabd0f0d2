"""Queries times compressed keys, without a softmax, on int8 matrix units: the kernel, its text and its launcher.

One warp is a program: it takes one KV head, up to eight rows (query head of the group, query), and a span of tokens,
and stores their scores. Keys go from packed codes to matrix operands in registers, as they do for attention
(`fragment`), and what rounds is q alone, to 15 bits of its largest. Every score is written by one program in one
order, so that equal inputs give equal bits.
"""

from functools import cache
from types import ModuleType

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.codec import Codec
from tqcompile.coding import Planes, split
from tqcompile.kernels import (
    blocks,
    emit,
    fragment,
    integer,
    launcher,
    operands,
    products,
    query,
    sides,
    tiles,
    tune,
    tuned,
)
from tqcompile.kernels.blocks import BlockSide
from tqcompile.kernels.fragment import scores_of
from tqcompile.kernels.products import key_tables
from tqcompile.kernels.query import load_query, rows_of
from tqcompile.kernels.sides import Side
from tqcompile.kernels.tiles import load_key_tile


# fmt: off
@gluon.jit(do_not_specialize=["groups", "length", "span"])
def logits_fragments(
    q, codes, scale, words, out, kv_heads, groups, queries, length, span,
    q_b, q_h, q_t, q_d, codes_b, codes_h, scale_b, scale_h,
    KEY_S: gl.constexpr, KEY_SCALE_S: gl.constexpr, T: gl.constexpr, R: gl.constexpr, num_warps: gl.constexpr = 1,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    zeros, _ = gl.split(gl.reshape(gl.full([T, 2 * R], 0.0, gl.float32, MMA), [T, R, 2]))
    SCORES: gl.constexpr = zeros.type.layout
    batch = (gl.program_id(0) // kv_heads).to(gl.int64)
    head = (gl.program_id(0) % kv_heads).to(gl.int64)
    first = gl.program_id(2) * span
    count = gl.minimum(span, length - first)
    start = first.to(gl.int64)
    at = codes + batch * codes_b + head * codes_h + start * KEY_S, scale + batch * scale_b + head * scale_h
    at = at[0], at[1] + start * KEY_SCALE_S
    q += batch * q_b + head * groups * q_h
    x = load_query(q, q_h, q_t, q_d, queries, groups, R)
    # The first tile is on its way while the rows are prepared.
    tile = load_key_tile(at[0], at[1], count - 1, T, SCORES, KEY_S, KEY_SCALE_S)

    asked, unit = rows_of(x, q, q_h, q_t, q_d, queries, groups, 1.0, MMA, SCORES, R)
    table = key_tables(words, T)
    row = gl.program_id(1) * R + gl.arange(0, R, gl.SliceLayout(0, SCORES))
    real = (row < groups * queries)[None, :]
    token = gl.arange(0, T, gl.SliceLayout(1, SCORES))[:, None]
    place = (gl.program_id(0).to(gl.int64) * (groups * queries) + row) * length + first
    address = out + place[None, :] + token

    full = count // T
    for i in range(full):
        step = gl.where(i + 1 < full, T, 0)
        at = at[0] + step * KEY_S, at[1] + step * KEY_SCALE_S
        following = load_key_tile(at[0], at[1], None, T, SCORES, KEY_S, KEY_SCALE_S)
        scores = scores_of(tile, asked, unit, table, T, R, MMA)
        gl.store(address, scores.to(out.dtype.element_ty), mask=real & (token < T))
        tile = following
        address += T
    count -= full * T
    if count > 0:
        step = gl.where(full > 0, T, 0)
        at = at[0] + step * KEY_S, at[1] + step * KEY_SCALE_S
        tile = load_key_tile(at[0], at[1], count - 1, T, SCORES, KEY_S, KEY_SCALE_S)
        scores = scores_of(tile, asked, unit, table, T, R, MMA)
        gl.store(address, scores.to(out.dtype.element_ty), mask=real & (token < count))
# fmt: on


KERNELS = (
    *(operands.doublings, operands.word_layout, operands.bytes_of, operands.places),
    *(operands.shifted, operands.word_of, operands.load_words, operands.row_of, operands.load_keys),
    *(operands.fields_of, operands.key_operand, operands.table_like, *query.KERNELS, products.key_product),
    *(products.key_tables, products.with_table, fragment.scores_of, tiles.load_key_tile, tiles.tokens_to),
    logits_fragments,
)
BLOCK_KERNELS = (
    *(blocks.load_key_blocks, blocks.scale_width, blocks.scale_layout, blocks.load_scales, blocks.each_scale),
    *(blocks.query_blocks, blocks.each_byte, blocks.block_scores),
)
CONSTANTS = ("ROUND", "QUERY_LIMIT", "PICK_BYTES")


def side_of(codec: Codec, head_dim: int) -> Side | BlockSide | None:
    """The side of keys that this kernel is printed for, or None where it takes no such codes."""
    return sides.side_of(codec, head_dim, 4)


def takes(q: torch.Tensor, keys: Planes, codec: Codec, head_dim: int) -> bool:
    """Whether this kernel multiplies q by such keys: a device with int8 units, few rows, whole words."""
    return side_of(codec, head_dim) is not None and integer.serves(q, [split(codec, keys)[0]])


@cache
def source(side: Side | BlockSide) -> str:
    """The text of the module that `logits` launches."""
    title = f"Queries times keys of {side.bits} bits, {side.head_dim} dims."
    in_blocks = isinstance(side, BlockSide)
    constants = [f"{name} = gl.constexpr({getattr(operands, name).value!r})" for name in CONSTANTS]
    helpers = (side.constants("KEY"), *constants, *([] if in_blocks else [integer.key_look_up(side)]))
    return emit.module_text(title, helpers, KERNELS + BLOCK_KERNELS * in_blocks, integer.HEADER)


@cache
def module(side: Side | BlockSide, folder: str | None) -> ModuleType:
    """The imported module of `source`."""
    return emit.build(source(side), folder, False)


def choice_of(
    side: Side | BlockSide, rows: int, heads: int, length: int, device: torch.device
) -> tuple[tuned.Key, tune.Setting]:
    """The name of a search for `rows` query rows on each of `heads` KV heads, and what is done where none was made."""
    setting = tune.logits_setting(rows, side.head_dim, side.breadth, side.crowded, side.bits)
    return tuned.key_of(source(side), rows, heads, length, device), setting


def plan_of(side: Side | BlockSide, rows: int, heads: int, length: int, device: torch.device) -> tune.AttendPlan:
    """The plan for `rows` query rows on each of `heads` KV heads over `length` tokens."""
    return tuned.plan(choice_of, side, rows, heads, length, device)


def logits(
    q: torch.Tensor,
    keys: Planes,
    codec: Codec,
    head_dim: int,
    folder: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`reference.logits` of what `takes` takes, with 15 bits of q.

    q [B, Hq, T, D] float32, float16 or bfloat16 in the key basis, any strides; planes [B, Hkv, S, width], any strides
    but contiguous in the last. Returns [B, Hq, T, S] in `dtype`. A row of q with a number that is none, or infinite,
    gets scores that are none. Nothing waits for the device, and after a call with like arguments a CUDA graph can
    capture it. Generated files go to `folder`.
    """
    codes, scale = split(codec, keys)
    batch, query_heads, queries, _ = q.shape
    kv_heads, length = codes.shape[1], codes.shape[2]
    out = q.new_empty((batch, query_heads, queries, length), dtype=dtype)
    if not out.numel():
        return out
    groups, side = query_heads // kv_heads, side_of(codec, head_dim)
    plan = plan_of(side, groups * queries, batch * kv_heads, length, q.device)
    launcher.launch(
        module(side, folder),
        "logits_fragments",
        (batch * kv_heads, -(-groups * queries // plan.block_rows), plan.splits),
        (q, codes, scale, integer.table_of(codec, head_dim, q.device), out),
        (kv_heads, groups, queries, length, plan.span, *q.stride(), *codes.stride()[:2], *scale.stride()[:2]),
        (codes.stride(2), scale.stride(2), plan.block_tokens, plan.block_rows),
        num_warps=1,
        maxnreg=plan.registers,
    )
    return out
