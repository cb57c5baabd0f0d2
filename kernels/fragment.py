"""Attention of a few query rows over codes of one to five bits, on int8 matrix units: the kernel.

One warp is a program: it takes one KV head, up to eight rows (query head of the group, query), and a span of tokens.
Keys and values go from packed codes to matrix operands in registers (`products`). Sums of products are exact integers;
what rounds is q, and the probabilities of a tile times their values' scalars, each to 15 bits of its largest.

`emit` prints `key_look_up`, `value_look_up` and `read_scores` above this, and the numbers of `Side`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tqcompile.kernels.blocks import block_scores, mix_blocks
from tqcompile.kernels.operands import WEIGHT_LIMIT, larger, weight_operand
from tqcompile.kernels.products import key_product, key_tables, value_product, value_tables
from tqcompile.kernels.query import load_query, rows_of
from tqcompile.kernels.spans import advanced, masked_by, reached
from tqcompile.kernels.sums import store_sums
from tqcompile.kernels.tiles import load_key_tile, load_value_tile

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
read_scores = None
KEY_BREADTH = VALUE_BREADTH = gl.constexpr(0)
# Blocks of a side of `blocks`, or pieces where its codes are looked up; the other is zero.
KEY_BLOCKS = KEY_PIECES = VALUE_BLOCKS = VALUE_PIECES = VALUE_SCALARS = VALUE_PARTS = gl.constexpr(0)
# One number for each piece.
KEY_SCALAR = VALUE_SCALAR = gl.constexpr(())
# One for each piece or block.
VALUE_DIMS = gl.constexpr(())

LOG2_E = gl.constexpr(1.4426950408889634)


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
        scores, product = 0.0, gl.full([T, 2 * R], 0, gl.int32, MMA)
        for piece in gl.static_range(KEY_PIECES):
            words, high = keys[0][piece], keys[1][piece]
            product = key_product(words, high, key_table[piece], asked[piece], product, piece, T, MMA)
            if piece + 1 == KEY_PIECES or KEY_SCALAR[piece] != KEY_SCALAR[piece + 1]:
                coarse, fine = gl.split(gl.reshape(product, [T, R, 2]))
                # The product with zero makes a key whose scalar is infinite no number, as its decoded dims would.
                scalars = keys[2][KEY_SCALAR[piece]].to(gl.float32)
                scalars = (scalars + scalars * 0.0)[:, None] * unit[KEY_SCALAR[piece]][None, :]
                part = (coarse * 256 + fine).to(gl.float32) * scalars
                scores = part if KEY_SCALAR[piece] == 0 else scores + part
                product = gl.full([T, 2 * R], 0, gl.int32, MMA)
        return scores


@gluon.jit
def mix(values, weights, rescale, mixed, value_table, T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """The weights, and the sums `mixed` of each piece after the values of a tile. Where a row met a value which is no
    number, its weights are none, or, of several scalars, the sums of that one's pieces."""
    marked, after = weights, ()
    for piece in gl.static_range(VALUE_PIECES):
        if piece == 0 or VALUE_SCALAR[piece] != VALUE_SCALAR[piece - 1]:
            # A token whose weight is none repeats the last one, and adds nothing that this one does not.
            scaled = weights * values[2][VALUE_SCALAR[piece]].to(gl.float32)[:, None]
            if VALUE_SCALARS == 1:
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
    key_table, value_table = key_tables(key_words, T), value_tables(value_words, T)

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


KERNELS = (scores_of, mix, added, absorb, nothing_absorbed)
