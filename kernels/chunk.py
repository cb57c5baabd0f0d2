"""Attention of a chunk of queries: a tile of codes is decoded once for 64 rows or 128, and multiplied as bfloat16.

For Hopper's matrix units, which take operands of that size out of shared memory, and work on while a program does
something else: values are decoded during the product of queries and keys, and the next keys during that of weights and
values. A program of few rows would multiply padding: those are for `integer`, and so is what is not bfloat16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tqcompile.kernels.bfloats import load_codes, side_by_side, table_beside
from tqcompile.kernels.spans import advanced, clear_tiles, reached

# Printed by `chunks`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
read_scores = key_look_up = value_look_up = None
KEY_RUN = KEY_HIGH_RUN = KEY_WORDS = KEY_FIELDS = KEY_DIMS = KEY_NUMBERS = KEY_TABLES = gl.constexpr(0)
VALUE_RUN = VALUE_HIGH_RUN = VALUE_WORDS = VALUE_FIELDS = VALUE_DIMS = VALUE_NUMBERS = VALUE_TABLES = gl.constexpr(0)
# EXPONENT takes what a score is here to the logarithm to base two of its weight, PEAK_UNIT to the score.
KEY_UNIT = VALUE_UNIT = EXPONENT = PEAK_UNIT = gl.constexpr(1.0)


@gluon.jit
def shared_tile(ROWS: gl.constexpr, DIMS: gl.constexpr):
    """Shared memory for bfloat16 [ROWS, DIMS] as matrix units read it."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128 if DIMS >= 64 else 2 * DIMS, 16, 2)
    return gl.allocate_shared_memory(gl.bfloat16, [ROWS, DIMS], LAYOUT)


@gluon.jit
def coordinate_of(place, RUN: gl.constexpr, WORDS: gl.constexpr, NUMBERS: gl.constexpr):
    """Which coordinate a place in a tile is, and whether it is one: runs are padded to a power of two of words."""
    column = place % (4 * WORDS)
    at = place // (4 * WORDS) * RUN + column
    return at, (column < RUN) & (at < NUMBERS)


@gluon.jit
def load_rows(q, q_h, q_t, q_d, queries, groups, R: gl.constexpr, WARPS: gl.constexpr):
    """Rows of q [R, KEY_DIMS] in the order of a tile of keys; those past the last repeat it."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    row = gl.program_id(1) * R + gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    row = gl.minimum(row, groups * queries - 1).to(gl.int64)
    at, inside = coordinate_of(gl.arange(0, KEY_DIMS, gl.SliceLayout(0, LAYOUT)), KEY_RUN, KEY_WORDS, KEY_NUMBERS)
    address = q + (row // queries * q_h + row % queries * q_t)[:, None] + (at * q_d)[None, :]
    return gl.load(address, mask=inside[None, :], other=0.0)


# fmt: off
@gluon.jit
def load_tile(
    at, last, T: gl.constexpr, KEY_S: gl.constexpr, KEY_SCALE_S: gl.constexpr, VALUE_S: gl.constexpr,
    VALUE_SCALE_S: gl.constexpr, WARPS: gl.constexpr,
):
    """Codes of keys, codes of values, and the scalars of both, at four pointers; tokens after `last` repeat it."""
    token = gl.minimum(gl.arange(0, T, gl.BlockedLayout([1], [32], [WARPS], [0])), last)
    scalars = gl.load(at[1] + token * KEY_SCALE_S), gl.load(at[3] + token * VALUE_SCALE_S)
    keys = load_codes(at[0], last, T, KEY_S, KEY_RUN, KEY_HIGH_RUN, KEY_WORDS, WARPS)
    return keys, load_codes(at[2], last, T, VALUE_S, VALUE_RUN, VALUE_HIGH_RUN, VALUE_WORDS, WARPS), scalars
# fmt: on


@gluon.jit
def put_keys(keys, codes, table, T: gl.constexpr):
    """Decode a tile of keys into shared memory."""
    keys.store(side_by_side(key_look_up(codes[0], codes[1], table), T, 4 * KEY_WORDS, KEY_FIELDS))
    # Who writes what matrix units read fences, and before the barrier, which may be that of the next wait.
    hopper.fence_async_shared()


@gluon.jit
def put_values(values, codes, table, T: gl.constexpr):
    """Decode a tile of values into shared memory."""
    values.store(side_by_side(value_look_up(codes[0], codes[1], table), T, 4 * VALUE_WORDS, VALUE_FIELDS))
    hopper.fence_async_shared()


@gluon.jit
def put_scalars(slots, scalars, unit):
    """Put the scalars of a tile into shared memory, those of keys times `unit`."""
    keys = scalars[0].to(gl.float32)
    # The product with zero makes a key whose scalar is infinite no number, as its decoded dims would.
    slots.index(0).store((keys + keys * 0.0) * unit)
    slots.index(1).store(scalars[1].to(gl.float32))


@gluon.jit
def absorb(scores, scalars, state):
    """The running softmax (peak, total, mixed) before the values of a tile are added, and their weights."""
    peak, total, mixed = state
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    pivot = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2((scores - pivot[:, None]) * EXPONENT)
    rescale = gl.exp2((peak - pivot) * EXPONENT)
    total = total * rescale + gl.sum(weights, 1)
    mixed = mixed * gl.convert_layout(rescale, gl.SliceLayout(1, mixed.type.layout))[:, None]
    return new_peak, total, mixed, weights * scalars[None, :]


# fmt: off
@gluon.jit(do_not_specialize=[
    "scale", "groups", "length", "span", "splits", "mask_b", "mask_h", "mask_t", "reach_b",
])
def attend_chunk(
    q, key_codes, key_scale, value_codes, value_scale, key_words, value_words, mask, reach, out, peaks, totals,
    scale, kv_heads, groups, queries, length, span, splits,
    q_b, q_h, q_t, q_d, key_b, key_h, key_scale_b, key_scale_h, value_b, value_h, value_scale_b, value_scale_h,
    mask_b, mask_h, mask_t, mask_s, reach_b,
    KEY_S: gl.constexpr, KEY_SCALE_S: gl.constexpr, VALUE_S: gl.constexpr, VALUE_SCALE_S: gl.constexpr,
    REACH: gl.constexpr, T: gl.constexpr, R: gl.constexpr, EARLY: gl.constexpr, num_warps: gl.constexpr = 4,
):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, T, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, VALUE_DIMS, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    TOKENS: gl.constexpr = gl.SliceLayout(0, SCORES)
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
    if REACH == 3:
        clear = gl.load(reach + batch * reach_b + 2) - first
    start = first.to(gl.int64)
    at = (
        key_codes + batch * key_b + head * key_h, key_scale + batch * key_scale_b + head * key_scale_h,
        value_codes + batch * value_b + head * value_h, value_scale + batch * value_scale_b + head * value_scale_h,
    )
    at = advanced(at, start, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
    last = gl.maximum(count - 1, 0)
    tile = load_tile(at, last, T, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S, num_warps)
    key_table = table_beside(key_words, KEY_WORDS, num_warps, KEY_TABLES)
    value_table = table_beside(value_words, VALUE_WORDS, num_warps, VALUE_TABLES)

    rows, keys, values = shared_tile(R, KEY_DIMS), shared_tile(T, KEY_DIMS), shared_tile(T, VALUE_DIMS)
    slots = gl.allocate_shared_memory(gl.float32, [2, T], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rows.store(load_rows(q + batch * q_b + head * groups * q_h, q_h, q_t, q_d, queries, groups, R, num_warps))
    put_scalars(slots, tile[2], scale * KEY_UNIT)
    put_keys(keys, tile[0], key_table, T)

    row = gl.minimum(gl.program_id(1) * R + gl.arange(0, R, ROWS), groups * queries - 1)
    mask_row = batch * mask_b + (head * groups + row // queries) * mask_h + (row % queries).to(gl.int64) * mask_t
    token, query = gl.arange(0, T, TOKENS), row % queries - first
    nothing = gl.full([R, T], 0.0, gl.float32, SCORES)
    peak, total = gl.full([R], float("-inf"), gl.float32, ROWS), gl.full([R], 0.0, gl.float32, ROWS)
    mixed = gl.full([R, VALUE_DIMS], 0.0, gl.float32, SUMS)
    done, tiles = 0, gl.cdiv(count, T)
    # First those that need no mask, in a loop of their own: Triton 3.6 dies of a branch.
    for MASKED in gl.static_range(0 if REACH == 3 else 1, 2):
        stop = tiles if MASKED else clear_tiles(clear, count, T)
        for i in range(done, stop):
            scores = hopper.warpgroup_mma(rows, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
            put_values(values, tile[1], value_table, T)
            # The next tile, or the last one again.
            step = gl.where(last >= T, T, 0)
            at = advanced(at, step, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
            tile = load_tile(at, last - step, T, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S, num_warps)
            scores = hopper.warpgroup_mma_wait(0, deps=(scores, rows, keys))[0] * slots.index(0).load(TOKENS)[None, :]
            # Made anew for each tile: the addresses of all scores would take most registers.
            address = mask_row[:, None] + ((gl.minimum(token, last) + i * T + start) * mask_s)[None, :]
            scores = read_scores(scores, mask, address, query[:, None], token[None, :], None, None, not MASKED)
            if last < T - 1:
                scores = gl.where((token <= last)[None, :], scores, float("-inf"))
            peak, total, mixed, weights = absorb(scores, slots.index(1).load(TOKENS), (peak, total, mixed))
            weights = gl.convert_layout(weights.to(gl.bfloat16), gl.DotOperandLayout(0, SUMS, 2))
            mixed = hopper.warpgroup_mma(weights, values, mixed, is_async=True)
            put_scalars(slots, tile[2], scale * KEY_UNIT)
            put_keys(keys, tile[0], key_table, T)
            mixed = hopper.warpgroup_mma_wait(0, deps=(mixed, values))[0]
            last -= T
            query -= T
        done = stop
    store_rows(out, peaks, totals, peak, total, mixed, splits, groups * queries, R)


@gluon.jit
def store_rows(out, peaks, totals, peak, total, mixed, splits, rows, R: gl.constexpr):
    """Store what this split leaves of its rows, for `combine`: sums in the order of dims, peaks and totals."""
    place = (gl.program_id(0).to(gl.int64) * splits + gl.program_id(2)) * rows
    row = gl.program_id(1) * R + gl.arange(0, R, peak.type.layout)
    gl.store(peaks + place + row, peak * PEAK_UNIT, mask=row < rows)
    gl.store(totals + place + row, total, mask=row < rows)
    row = gl.program_id(1) * R + gl.arange(0, R, gl.SliceLayout(1, mixed.type.layout))
    dim = gl.arange(0, VALUE_DIMS, gl.SliceLayout(0, mixed.type.layout))
    at, inside = coordinate_of(dim, VALUE_RUN, VALUE_WORDS, VALUE_NUMBERS)
    address = out + (place + row)[:, None] * VALUE_NUMBERS + at[None, :]
    gl.store(address, mixed * VALUE_UNIT, mask=(row < rows)[:, None] & inside[None, :])
# fmt: on


KERNELS = (
    *(shared_tile, coordinate_of, load_rows, load_tile, put_keys, put_values, put_scalars, absorb),
    *(attend_chunk, store_rows),
)
