"""Attention of a few query rows over codes of one to five bits, on int8 matrix units: the kernel.

One warp is a program: it takes one KV head, up to eight rows (query head of the group, query), and a span of tokens.
Keys and values go from packed codes to matrix operands in registers (`operands`). Sums of products are exact integers;
what rounds is q, and the probabilities of a tile times their values' scalars, each to 15 bits of its largest.

`emit` prints `key_look_up`, `value_look_up` and `read_scores` above this, and the numbers of `Side`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tqcompile.kernels.blocks import block_scores, mix_blocks
from tqcompile.kernels.operands import (
    WEIGHT_LIMIT,
    eight_nibbles,
    fields_of,
    four_tokens,
    key_operand,
    larger,
    table_like,
    value_operand,
    weight_operand,
    word_layout,
)  # fmt: skip
from tqcompile.kernels.query import load_query, rows_of
from tqcompile.kernels.spans import advanced, masked_by, reached
from tqcompile.kernels.sums import store_sums
from tqcompile.kernels.tiles import load_key_tile, load_value_tile

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
key_look_up = value_look_up = read_scores = None
KEY_BREADTH = VALUE_BREADTH = gl.constexpr(0)
# Blocks of a side of `blocks`, or pieces where its codes are looked up; the other is zero.
KEY_BLOCKS = KEY_PIECES = VALUE_BLOCKS = VALUE_PIECES = VALUE_PARTS = gl.constexpr(0)
# One number for each piece.
KEY_WORDS = KEY_FIELDS = KEY_TERMS = KEY_DIMS = VALUE_WORDS = VALUE_FIELDS = VALUE_TERMS = gl.constexpr(())
# One for each piece or block.
VALUE_DIMS = gl.constexpr(())

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def key_product(codes, high, table, asked, PIECE: gl.constexpr, T: gl.constexpr, MMA: gl.constexpr, R: gl.constexpr):
    """The integers [T, R, 2] of a piece of keys times the two parts of each row of q."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    FIELDS: gl.constexpr = KEY_FIELDS[PIECE]
    TERMS: gl.constexpr = KEY_TERMS[PIECE]
    x = key_look_up(codes, high, table, PIECE)
    product = gl.full([T, 2 * R], 0, gl.int32, MMA)
    operand = key_operand(fields_of(x, 0, 2, FIELDS), fields_of(x, 1, 2, FIELDS), T, KEY_DIMS[PIECE])
    for term in gl.static_range(1, TERMS):
        product = mma_v2(gl.convert_layout(operand, LEFT), asked, product)
        operand = key_operand(x[2 * term], x[2 * term + 1], T, KEY_DIMS[PIECE])
    return gl.reshape(mma_v2(gl.convert_layout(operand, LEFT), asked, product), [T, R, 2])


@gluon.jit
def value_product(
    codes, high, table, weights, PIECE: gl.constexpr, T: gl.constexpr, MMA: gl.constexpr, R: gl.constexpr
):
    """The integers [VALUE_DIMS, R, 2] of a piece of values times the two parts of each row's weights."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    WORDS: gl.constexpr = VALUE_WORDS[PIECE]
    DIMS: gl.constexpr = VALUE_DIMS[PIECE]
    FIELDS: gl.constexpr = VALUE_FIELDS[PIECE]
    TERMS: gl.constexpr = VALUE_TERMS[PIECE]
    x = value_look_up(four_tokens(codes, T, WORDS), four_tokens(high, T, WORDS), table, PIECE)
    product = gl.full([DIMS, 2 * R], 0, gl.int32, MMA)
    eights = ()
    for eight in gl.static_range(FIELDS * TERMS):
        eights = eights + (eight_nibbles(x, 8 * eight),)
    for term in gl.static_range(TERMS - 1):
        product = mma_v2(gl.convert_layout(value_operand(eights[term], T, DIMS), LEFT), weights, product)
    operand = value_operand(fields_of(eights, TERMS - 1, 1, FIELDS), T, DIMS)
    return gl.reshape(mma_v2(gl.convert_layout(operand, LEFT), weights, product), [DIMS, R, 2])


# fmt: off
@gluon.jit
def load_tile(
    at, last, T: gl.constexpr, SCORES: gl.constexpr,
    KEY_S: gl.constexpr, KEY_SCALE_S: gl.constexpr, VALUE_S: gl.constexpr, VALUE_SCALE_S: gl.constexpr,
):
    """What is read of a tile of keys and of values at four pointers."""
    keys = load_key_tile(at[0], at[1], last, T, SCORES, KEY_S, KEY_SCALE_S)
    return keys, load_value_tile(at[2], at[3], last, T, SCORES, VALUE_S, VALUE_SCALE_S)


@gluon.jit
def scores_of(keys, asked, unit, key_table, T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """Scores [T, R] of a tile's keys."""
    if KEY_BLOCKS:
        return block_scores(keys[0], keys[1], asked, unit, T, R, MMA)
    else:
        scores = 0.0
        for piece in gl.static_range(KEY_PIECES):
            product = key_product(keys[0][piece], keys[1][piece], key_table[piece], asked[piece], piece, T, MMA, R)
            coarse, fine = gl.split(product)
            # The product with zero makes a key whose scalar is infinite no number, as its decoded dims would.
            scalars = keys[2][piece].to(gl.float32)
            part = (coarse * 256 + fine).to(gl.float32) * ((scalars + scalars * 0.0)[:, None] * unit[piece][None, :])
            if piece == 0:
                scores = part
            else:
                scores += part
        return scores


@gluon.jit
def mix(values, weights, rescale, mixed, value_table, T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """The weights, and the sums `mixed` of each piece after the values of a tile. Where a row met a value which is no
    number, its weights are none, or, of several pieces, the sums of that piece."""
    marked, after = weights, ()
    for piece in gl.static_range(VALUE_PIECES):
        # A token whose weight is none repeats the last one, and adds nothing that this one does not.
        scaled = weights * values[2][piece].to(gl.float32)[:, None]
        if VALUE_PIECES == 1:
            size = gl.maximum(gl.max(gl.abs(scaled), 0), 1e-30)
            # The product with zero marks such a row; integers would hide it.
            marked = weights + scaled * 0.0
        else:
            size = larger(gl.reduce(gl.abs(scaled), 0, larger), 1e-30)
        operand = weight_operand(scaled * (WEIGHT_LIMIT / size)[None, :], T, R)
        operand = gl.convert_layout(operand, gl.DotOperandLayout(1, MMA, 4))
        product = value_product(values[0][piece], values[1][piece], value_table[piece], operand, piece, T, MMA, R)
        after = after + (added(mixed[piece], rescale, product, size),)
    return marked, after


@gluon.jit
def added(sums, rescale, product, size):
    """The sums of a piece after the integers of a tile, whose weights were `size` at most."""
    coarse, fine = gl.split(product)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, sums.type.layout)
    sums = sums * gl.convert_layout(rescale, COLUMNS)[None, :]
    unit = gl.convert_layout(size * (1.0 / WEIGHT_LIMIT), COLUMNS)
    return sums + (coarse * 256 + fine).to(gl.float32) * unit[None, :]


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
    mixed = ()
    for part in gl.static_range(VALUE_PARTS):
        sums = gl.full([VALUE_DIMS[part], 2 * R], 0.0, gl.float32, MMA)
        mixed = mixed + (gl.split(gl.reshape(sums, [VALUE_DIMS[part], R, 2]))[0],)
    peak = gl.full([R], float("-inf"), gl.float32, gl.SliceLayout(0, zeros.type.layout))
    return peak, gl.sum(gl.reshape(zeros, [T // 8, 8, R]), 0), mixed


@gluon.jit
def tables_like(key_words, value_words, T: gl.constexpr):
    """The look-up operands of each piece beside the words of a tile of keys, and beside those of four tokens of
    values."""
    keys, values = (), ()
    for piece in gl.static_range(KEY_PIECES):
        keys = keys + (table_like(key_words + 192 * piece, word_layout(T // 8, KEY_WORDS[piece])),)
    for piece in gl.static_range(VALUE_PIECES):
        values = values + (value_table_like(value_words + 192 * piece, T, VALUE_WORDS[piece]),)
    return keys, values


@gluon.jit
def value_table_like(table, T: gl.constexpr, WORDS: gl.constexpr):
    """The look-up operands beside the words of four tokens of values."""
    words = gl.full([T // 4, 32, WORDS], 0, gl.int32, word_layout(T // 4, WORDS))
    FIRST: gl.constexpr = four_tokens(words, T, WORDS)[0].type.layout
    return table_like(table, FIRST)


@gluon.jit(do_not_specialize=[
    "scale", "groups", "length", "span", "splits", "mask_b", "mask_h", "mask_t",
    "reach_b",
])
def attend_fragments(
    q, key_codes, key_scale, value_codes, value_scale, key_words, value_words, mask, reach, out, peaks, totals,
    scale, kv_heads, groups, queries, length, span, splits,
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
    clear = first * 0
    if REACH:
        first, count = reached(reach + batch * reach_b, splits, T)
    if REACH == 3:
        clear = gl.load(reach + batch * reach_b + 2) - first
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

    asked, unit = rows_of(x, q, q_h, q_t, q_d, queries, groups, scale, MMA, SCORES, R)
    mask_row, query, token = masked_by(batch, head, groups, queries, mask_b, mask_h, mask_t, T, R, SCORES)
    query -= first
    address = mask_row[None, :] + start * mask_s + token[:, None] * mask_s
    key_table, value_table = tables_like(key_words, value_words, T)

    full = count // T
    # Where a tile's codes and the rows take most registers, none are left to ask for the next one meanwhile.
    AHEAD: gl.constexpr = KEY_BREADTH + VALUE_BREADTH + 64 * R <= 768
    for i in range(full):
        if not AHEAD:
            tile = load_tile(at, None, T, SCORES, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        step = gl.where(i + 1 < full, T, 0)
        at = advanced(at, step, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        scores = scores_of(tile[0], asked, unit, key_table, T, R, MMA)
        is_clear = clear >= T if REACH == 3 else False
        scores = read_scores(scores, mask, address, query[None, :], token[:, None], None, None, is_clear)
        state = absorb(tile[1], scores, state, value_table, None, T, R, MMA)
        if AHEAD:
            tile = load_tile(at, None, T, SCORES, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        query -= T
        clear -= T
        mask += T * mask_s
    count -= full * T
    if count > 0:
        step = gl.where(full > 0, T, 0)
        at = advanced(at, step, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        tile = load_tile(at, count - 1, T, SCORES, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        scores = scores_of(tile[0], asked, unit, key_table, T, R, MMA)
        is_clear = clear >= count if REACH == 3 else False
        scores = read_scores(scores, mask, address, query[None, :], token[:, None], None, count - 1, is_clear)
        state = absorb(tile[1], scores, state, value_table, count, T, R, MMA)
    store_sums(out, peaks, totals, state, splits, groups * queries, R)
# fmt: on


KERNELS = (
    *(key_product, value_product, scores_of, mix, added, absorb, nothing_absorbed, tables_like, value_table_like),
)
