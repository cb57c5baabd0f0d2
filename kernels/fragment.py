"""Attention of a few query rows over codes of two to five bits, on int8 matrix units: the kernel.

One warp is a program: it takes one KV head, up to eight rows (query head of the group, query), and a span of tokens.
Keys and values go from packed codes to matrix operands in registers (`operands`). Sums of products are exact integers;
what rounds is q, and the probabilities of a tile times their values' scalars, each to 15 bits of its largest.

`emit` prints `key_look_up`, `value_look_up` and `read_scores` above this, and the numbers of `Side`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tqcompile.kernels.blocks import (
    block_scores,
    load_key_blocks,
    load_scales,
    load_value_blocks,
    mix_blocks,
    repeated,
)
from tqcompile.kernels.operands import (
    WEIGHT_LIMIT,
    doublings,
    eight_nibbles,
    four_tokens,
    key_operand,
    load_keys,
    load_values,
    table_like,
    value_operand,
    weight_operand,
    word_layout,
)  # fmt: skip
from tqcompile.kernels.query import load_query, rows_of
from tqcompile.kernels.spans import advanced, masked_by, reached

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
key_look_up = value_look_up = read_scores = None
KEY_RUN = KEY_HIGH_RUN = KEY_WORDS = KEY_FIELDS = KEY_TERMS = KEY_DIMS = KEY_DIM = gl.constexpr(0)
VALUE_RUN = VALUE_HIGH_RUN = VALUE_WORDS = VALUE_FIELDS = VALUE_TERMS = VALUE_DIMS = VALUE_DIM = gl.constexpr(0)
VALUE_SHARED = gl.constexpr(False)
# Blocks of a side of `blocks`; zero where a side's codes are looked up.
KEY_BLOCKS = VALUE_BLOCKS = gl.constexpr(0)

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def key_product(codes, high, table, asked, T: gl.constexpr, MMA: gl.constexpr, R: gl.constexpr):
    """The integers [T, R, 2] of keys times the two parts of each row of q."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    x = key_look_up(codes, high, table)
    product = gl.full([T, 2 * R], 0, gl.int32, MMA)
    if KEY_FIELDS == 2:
        operand = key_operand(gl.join(x[0], x[2]), gl.join(x[1], x[3]), T, KEY_DIMS)
    else:
        operand = key_operand(x[0], x[1], T, KEY_DIMS)
    for term in gl.static_range(1, KEY_TERMS):
        product = mma_v2(gl.convert_layout(operand, LEFT), asked, product)
        operand = key_operand(x[2 * term], x[2 * term + 1], T, KEY_DIMS)
    return gl.reshape(mma_v2(gl.convert_layout(operand, LEFT), asked, product), [T, R, 2])


@gluon.jit
def value_product(codes, high, table, weights, T: gl.constexpr, MMA: gl.constexpr, R: gl.constexpr):
    """The integers [VALUE_DIMS, R, 2] of values times the two parts of each row's weights."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    x = value_look_up(four_tokens(codes, T, VALUE_WORDS), four_tokens(high, T, VALUE_WORDS), table)
    product = gl.full([VALUE_DIMS, 2 * R], 0, gl.int32, MMA)
    nibbles = eight_nibbles(x, 0)
    for term in gl.static_range(1, VALUE_TERMS):
        product = mma_v2(gl.convert_layout(value_operand(nibbles, T, VALUE_DIMS), LEFT), weights, product)
        nibbles = eight_nibbles(x, 8 * term)
    if VALUE_FIELDS == 2:
        nibbles = gl.join(nibbles, eight_nibbles(x, 8))
    operand = value_operand(nibbles, T, VALUE_DIMS)
    return gl.reshape(mma_v2(gl.convert_layout(operand, LEFT), weights, product), [VALUE_DIMS, R, 2])


# fmt: off
@gluon.jit
def load_tile(
    at, last, T: gl.constexpr, SCORES: gl.constexpr,
    KEY_S: gl.constexpr, KEY_SCALE_S: gl.constexpr, VALUE_S: gl.constexpr, VALUE_SCALE_S: gl.constexpr,
):
    """Words and scalars of a tile at four pointers; tokens after `last` repeat it (None: there are none)."""
    token = gl.arange(0, T, gl.SliceLayout(1, SCORES))
    if last is not None:
        token = gl.minimum(token, last)
    if KEY_BLOCKS:
        keys = load_key_blocks(at[0], last, T, KEY_S), load_scales(at[1], last, T, KEY_SCALE_S, KEY_BLOCKS)
    else:
        codes, high = load_keys(at[0], last, T, KEY_S, KEY_RUN, KEY_HIGH_RUN, KEY_WORDS)
        keys = codes, high, gl.load(at[1] + token * KEY_SCALE_S)
    if VALUE_BLOCKS:
        values = load_value_blocks(at[2], last, T, VALUE_S), load_scales(at[3], last, T, VALUE_SCALE_S, VALUE_BLOCKS)
    else:
        words, top = load_values(at[2], last, T, VALUE_S, VALUE_RUN, VALUE_HIGH_RUN, VALUE_WORDS, VALUE_SHARED)
        values = words, top, gl.load(at[3] + token * VALUE_SCALE_S)
    return keys, values


@gluon.jit
def scores_of(keys, asked, unit, key_table, T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """Scores [T, R] of a tile's keys."""
    if KEY_BLOCKS:
        return block_scores(keys[0], keys[1], asked, unit, T, R, MMA)
    else:
        coarse, fine = gl.split(key_product(keys[0], keys[1], key_table, asked, T, MMA, R))
        # The product with zero makes a key whose scalar is infinite no number, as its decoded dims would.
        scalars = keys[2].to(gl.float32)
        return (coarse * 256 + fine).to(gl.float32) * ((scalars + scalars * 0.0)[:, None] * unit[None, :])


@gluon.jit
def mix(values, weights, rescale, mixed, value_table, T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """Weights that show where a row met a value which is no number, and the sums `mixed` after the values of a tile."""
    # A token whose weight is none repeats the last one, and adds nothing that this one does not.
    scaled = weights * values[2].to(gl.float32)[:, None]
    size = gl.maximum(gl.max(gl.abs(scaled), 0), 1e-30)
    operand = weight_operand(scaled * (WEIGHT_LIMIT / size)[None, :], T, R)
    operand = gl.convert_layout(operand, gl.DotOperandLayout(1, MMA, 4))
    coarse, fine = gl.split(value_product(values[0], values[1], value_table, operand, T, MMA, R))
    columns: gl.constexpr = gl.SliceLayout(0, mixed.type.layout)
    mixed = mixed * gl.convert_layout(rescale, columns)[None, :]
    mixed += (coarse * 256 + fine).to(gl.float32) * gl.convert_layout(size * (1.0 / WEIGHT_LIMIT), columns)[None, :]
    # The product with zero marks a row that met a value which is no number; integers would hide it.
    return weights + scaled * 0.0, mixed


@gluon.jit
def absorb(values, scores, state, value_table, count, T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """The running softmax of R rows (peak, total, mixed) after a tile of T tokens, or its first `count`."""
    peak, total, mixed = state
    if count is not None:
        inside = gl.arange(0, T, gl.SliceLayout(1, scores.type.layout)) < count
        scores = gl.where(inside[:, None], scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 0))
    pivot = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    rescale = gl.exp2((peak - pivot) * LOG2_E)
    weights = gl.exp2((scores - pivot[None, :]) * LOG2_E)
    if VALUE_BLOCKS:
        marked, mixed = weights, mix_blocks(values[0], values[1], weights, rescale, mixed, T, R, MMA)
    else:
        marked, mixed = mix(values, weights, rescale, mixed, value_table, T, R, MMA)
    part = gl.sum(gl.reshape(marked, [T // 8, 8, R]), 0)
    total = total * gl.convert_layout(rescale, gl.SliceLayout(0, total.type.layout))[None, :] + part
    return new_peak, total, mixed


@gluon.jit
def nothing_absorbed(T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """The running softmax of R rows (peak, total, mixed) before any tile."""
    zeros, _ = gl.split(gl.reshape(gl.full([T, 2 * R], 0.0, gl.float32, MMA), [T, R, 2]))
    mixed, _ = gl.split(gl.reshape(gl.full([VALUE_DIMS, 2 * R], 0.0, gl.float32, MMA), [VALUE_DIMS, R, 2]))
    if VALUE_BLOCKS:
        mixed = repeated(mixed, VALUE_BLOCKS)
    peak = gl.full([R], float("-inf"), gl.float32, gl.SliceLayout(0, zeros.type.layout))
    return peak, gl.sum(gl.reshape(zeros, [T // 8, 8, R]), 0), mixed


@gluon.jit
def tables_like(key_words, value_words, T: gl.constexpr):
    """The look-up operands beside the words of a tile of keys, and beside those of four tokens of values."""
    words = gl.full([T // 4, 32, VALUE_WORDS], 0, gl.int32, word_layout(T // 4, VALUE_WORDS))
    FIRST: gl.constexpr = four_tokens(words, T, VALUE_WORDS)[0].type.layout
    return table_like(key_words, word_layout(T // 8, KEY_WORDS)), table_like(value_words, FIRST)


@gluon.constexpr_function
def sums_layout(dims, rows):
    """[rows, dims]: what a lane has of the sums of a row, four of them side by side (`Side.order`)."""
    registers = [[0, 1], [0, 2]] + [[0, at] for at in doublings(32, dims)] + [[at, 0] for at in doublings(4, rows)]
    return gl.DistributedLinearLayout(registers, [[1, 0], [2, 0], [0, 4], [0, 8], [0, 16]], [], [], [rows, dims])


@gluon.jit
def store_sums(out, peaks, totals, state, splits, rows, value_unit, R: gl.constexpr):
    """Store what this split leaves of its rows: sums as lanes have them, peaks and totals."""
    peak, total, mixed = state
    row = gl.program_id(1) * R + gl.arange(0, R, peak.type.layout)
    place = (gl.program_id(0).to(gl.int64) * splits + gl.program_id(2)) * rows
    gl.store(peaks + place + row, peak, mask=row < rows)
    total = gl.sum(total, 0)
    row = gl.program_id(1) * R + gl.arange(0, R, total.type.layout)
    gl.store(totals + place + row, total, mask=row < rows)
    LAYOUT: gl.constexpr = sums_layout(VALUE_DIMS, R)
    row = gl.program_id(1) * R + gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    number = gl.arange(0, VALUE_DIMS, gl.SliceLayout(0, LAYOUT))
    blocks = mixed
    if not VALUE_BLOCKS:
        blocks = (mixed,)
    for block in gl.static_range(len(blocks)):
        sums = gl.permute(gl.reshape(blocks[block], [VALUE_DIMS // 32, 4, 8, R]), [3, 0, 2, 1])
        sums = gl.convert_layout(gl.reshape(sums, [R, VALUE_DIMS]), LAYOUT)
        address = out + (place + row)[:, None] * (VALUE_DIMS * len(blocks)) + (number + block * VALUE_DIMS)[None, :]
        gl.store(address, sums * value_unit, mask=(row < rows)[:, None])


@gluon.jit(do_not_specialize=[
    "key_unit", "value_unit", "groups", "length", "span", "splits", "mask_b", "mask_h", "mask_t",
    "reach_b",
])
def attend_fragments(
    q, key_codes, key_scale, value_codes, value_scale, key_words, value_words, mask, reach, out, peaks, totals,
    key_unit, value_unit, kv_heads, groups, queries, length, span, splits,
    q_b, q_h, q_t, q_d, key_b, key_h, key_scale_b, key_scale_h, value_b, value_h, value_scale_b, value_scale_h,
    mask_b, mask_h, mask_t, mask_s, reach_b,
    KEY_S: gl.constexpr, KEY_SCALE_S: gl.constexpr, VALUE_S: gl.constexpr, VALUE_SCALE_S: gl.constexpr,
    REACH: gl.constexpr, T: gl.constexpr, R: gl.constexpr, EARLY: gl.constexpr, num_warps: gl.constexpr = 1,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    state = nothing_absorbed(T, R, MMA)
    SCORES: gl.constexpr = state[0].type.layout.parent
    batch = (gl.program_id(0) // kv_heads).to(gl.int64)
    head = (gl.program_id(0) % kv_heads).to(gl.int64)
    first = gl.program_id(2) * span
    count = gl.minimum(span, length - first)
    if EARLY:
        # Launched while what wrote the codes may still run: until here nothing of it is read.
        gdc_wait()
        # The combination may be put on the device now; it waits there for what this kernel writes.
        gdc_launch_dependents()
    if REACH:
        first, count = reached(reach + batch * reach_b, splits, T)
    start = first.to(gl.int64)
    at = (
        key_codes + batch * key_b + head * key_h, key_scale + batch * key_scale_b + head * key_scale_h,
        value_codes + batch * value_b + head * value_h, value_scale + batch * value_scale_b + head * value_scale_h,
    )
    at = advanced(at, start, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
    q += batch * q_b + head * groups * q_h
    x = load_query(q, q_h, q_t, q_d, queries, groups, R)
    # The first tile is on its way while the rows are prepared; each tile is, while the last one is used.
    tile = load_tile(at, gl.maximum(count - 1, 0), T, SCORES, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)

    asked, unit = rows_of(x, q, q_h, q_t, q_d, queries, groups, key_unit, MMA, SCORES, R)
    mask_row, query, token = masked_by(batch, head, groups, queries, mask_b, mask_h, mask_t, T, R, SCORES)
    query -= first
    address = mask_row[None, :] + start * mask_s + token[:, None] * mask_s
    key_table, value_table = tables_like(key_words, value_words, T)

    full = count // T
    # Where a tile's codes and the rows take most registers, none are left to ask for the next one meanwhile.
    AHEAD: gl.constexpr = max(KEY_DIM, 64 * KEY_BLOCKS) + max(VALUE_DIM, 64 * VALUE_BLOCKS) + 64 * R <= 768
    for i in range(full):
        if not AHEAD:
            tile = load_tile(at, None, T, SCORES, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        step = gl.where(i + 1 < full, T, 0)
        at = advanced(at, step, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        scores = scores_of(tile[0], asked, unit, key_table, T, R, MMA)
        scores = read_scores(scores, mask, address, query[None, :], token[:, None], None, None)
        state = absorb(tile[1], scores, state, value_table, None, T, R, MMA)
        if AHEAD:
            tile = load_tile(at, None, T, SCORES, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        query -= T
        mask += T * mask_s
    count -= full * T
    if count > 0:
        step = gl.where(full > 0, T, 0)
        at = advanced(at, step, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        tile = load_tile(at, count - 1, T, SCORES, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        scores = scores_of(tile[0], asked, unit, key_table, T, R, MMA)
        scores = read_scores(scores, mask, address, query[None, :], token[:, None], None, count - 1)
        state = absorb(tile[1], scores, state, value_table, count, T, R, MMA)
    store_sums(out, peaks, totals, state, splits, groups * queries, value_unit, R)
# fmt: on
