"""Attention of a few query rows on int8 matrix units, over tiles that come through shared memory: the kernel.

It computes what `fragment` does, of the same parts. There a tile waits in registers for the next turn of the loop, and
the compiler asks for the first one only when the query is ready; here the first is under way before that, and the
second from then on.
A copy moves whole sectors where rows of codes are whole halves of a cache line, or no longer than a sector, or where
those of a tile are copied together (`stretch`). Of others it moves more: they are for `fragment` (`sides.in_sectors`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tqcompile.kernels.fragment import absorb, nothing_absorbed, scores_of
from tqcompile.kernels.products import key_tables, value_tables
from tqcompile.kernels.query import load_query, rows_of
from tqcompile.kernels.ring import (
    fetch_rows,
    fetch_scales,
    read_keys,
    read_scales,
    read_values,
    scale_slots,
    slots,
    words_of,
)
from tqcompile.kernels.spans import advanced, clear_tiles, masked_by, reached, reached_in_words, shared_out
from tqcompile.kernels.stretch import fetch_stretch, stretches, words_in_line
from tqcompile.kernels.sums import store_sums
from tqcompile.kernels.tiles import scalars_of, side_scalars

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
mask_part = masked = read_scores = None
KEY_BLOCKS = KEY_PIECES = KEY_SCALARS = VALUE_BLOCKS = VALUE_PIECES = VALUE_SCALARS = gl.constexpr(0)
# One number for each piece, and where its words are read.
KEY_HIGH_RUN = KEY_FIRST = KEY_ROOM = KEY_WORDS = KEY_APART = KEY_READS = gl.constexpr(())
VALUE_HIGH_RUN = VALUE_FIRST = VALUE_ROOM = VALUE_WORDS = VALUE_APART = VALUE_READS = gl.constexpr(())
# Words of a row in the ring, or zero where rows lie there as they do in memory, and in memory.
KEY_ROW = KEY_COUNT = VALUE_ROW = VALUE_COUNT = gl.constexpr(0)


# fmt: off
@gluon.jit
def codes_ring(STAGES: gl.constexpr, T: gl.constexpr, ROW: gl.constexpr, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """Shared memory for the codes of `STAGES` tiles: rows of ROW words, or (zero) as they lie."""
    return slots(STAGES, T, ROW, COUNT, STRIDE) if ROW else stretches(STAGES, T, COUNT)


@gluon.jit
def make_ring(STAGES: gl.constexpr, T: gl.constexpr, KEY_S: gl.constexpr, VALUE_S: gl.constexpr):
    """Shared memory for `STAGES` tiles: codes and scalars of keys, and of values."""
    keys = codes_ring(STAGES, T, KEY_ROW, KEY_COUNT, KEY_S)
    values = codes_ring(STAGES, T, VALUE_ROW, VALUE_COUNT, VALUE_S)
    return keys, scale_slots(STAGES, T, KEY_SCALARS), values, scale_slots(STAGES, T, VALUE_SCALARS)


@gluon.jit
def fetch_codes(
    ring, stage, codes, last, T: gl.constexpr, ROW: gl.constexpr, COUNT: gl.constexpr, STRIDE: gl.constexpr,
):
    """Ask for the codes of a tile; tokens after `last` repeat it (None: there are none)."""
    if ROW:
        fetch_rows(ring.index(stage), codes, last, COUNT, STRIDE)
    else:
        fetch_stretch(ring.index(stage), codes, last, T, COUNT)


@gluon.jit
def fetch_tile(
    ring, stage, at, last, T: gl.constexpr, KEY_S: gl.constexpr, VALUE_S: gl.constexpr, SCALES: gl.constexpr,
):
    """Ask for a tile at four pointers, first its keys; tokens after `last` repeat it (None: there are none)."""
    fetch_codes(ring[0], stage, at[0], last, T, KEY_ROW, KEY_COUNT, KEY_S)
    if SCALES:
        fetch_scales(ring[1].index(stage), at[1], last, T, KEY_SCALARS)
    async_copy.commit_group()
    fetch_codes(ring[2], stage, at[2], last, T, VALUE_ROW, VALUE_COUNT, VALUE_S)
    if SCALES:
        fetch_scales(ring[3].index(stage), at[3], last, T, VALUE_SCALARS)
    async_copy.commit_group()


@gluon.jit
def keys_in(ring, stage, scales, T: gl.constexpr, SCORES: gl.constexpr, SCALES: gl.constexpr):
    """The words and scalars of a tile's keys."""
    rows = ring[0].index(stage)
    if KEY_BLOCKS:
        return read_keys(rows, T, 2, KEY_ROW // 8), scales
    else:
        words, high = (), ()
        for piece in gl.static_range(KEY_PIECES):
            if KEY_ROW:
                low = words_of(rows, T, 4, KEY_WORDS[piece], KEY_ROOM[piece], KEY_APART[piece])
                top = low
            else:
                low, top = words_in_line(
                    rows, T, 4, KEY_READS, piece, KEY_COUNT, KEY_HIGH_RUN[piece] // 4, KEY_FIRST[piece],
                    KEY_ROOM[piece], KEY_WORDS[piece], KEY_APART[piece],
                )
            words, high = words + (low,), high + (top,)
        if SCALES:
            scales = read_scales(ring[1].index(stage), T, KEY_SCALARS, SCORES)
        return words, high, scales


@gluon.jit
def values_in(ring, stage, scales, T: gl.constexpr, SCORES: gl.constexpr, SCALES: gl.constexpr):
    """The words and scalars of a tile's values."""
    rows = ring[2].index(stage)
    if VALUE_BLOCKS:
        return read_values(rows, T, 1, VALUE_ROW // 8), scales
    else:
        words, high = (), ()
        for piece in gl.static_range(VALUE_PIECES):
            if VALUE_ROW:
                low = words_of(rows, T, 8, VALUE_WORDS[piece], VALUE_ROOM[piece], VALUE_APART[piece])
                top = low
            else:
                low, top = words_in_line(
                    rows, T, 8, VALUE_READS, piece, VALUE_COUNT, VALUE_HIGH_RUN[piece] // 4, VALUE_FIRST[piece],
                    VALUE_ROOM[piece], VALUE_WORDS[piece], VALUE_APART[piece],
                )
            words, high = words + (low,), high + (top,)
        if SCALES:
            scales = read_scales(ring[3].index(stage), T, VALUE_SCALARS, SCORES)
        return words, high, scales


@gluon.jit
def those_there(scores, values, skip, left, T: gl.constexpr):
    """Scores and values of a tile whose tokens `skip` to `left` are there: what lies around them may be no number."""
    token = gl.arange(0, T, gl.SliceLayout(1, scores.type.layout))
    inside = (token >= skip) & (token < left)
    scalars = values[len(values) - 1]
    if (left < T) | (skip > 0):
        scores = gl.where(inside[:, None], scores, float("-inf"))
        if not VALUE_BLOCKS:
            there = ()
            for place in gl.static_range(VALUE_SCALARS):
                there = there + (gl.where(inside, scalars[place], 0.0),)
            scalars = there
    if VALUE_BLOCKS:
        return scores, values
    else:
        return scores, (values[0], values[1], scalars)


@gluon.jit
def mixed_in(
    ring, stage, scores, scales, state, value_table, skip, left, STAGES: gl.constexpr, SCALES: gl.constexpr,
    MMA: gl.constexpr,
):
    """The running softmax after a tile whose scores these are, and whose tokens `skip` to `left` are there."""
    async_copy.wait_group(2 * STAGES - 2)
    T: gl.constexpr = scores.shape[0]
    R: gl.constexpr = scores.shape[1]
    SCORES: gl.constexpr = scores.type.layout
    values = values_in(ring, stage, scales, T, SCORES, SCALES)
    scores, values = those_there(scores, values, skip, left, T)
    return absorb(values, scores, state, value_table, None, T, R, MMA)


@gluon.jit
def part_of(mask, address, query, token, skip, left, SHIFTED: gl.constexpr):
    """What is read of the mask for a tile whose tokens `skip` to `left` are there."""
    return mask_part(mask, address, query[None, :], token[:, None], skip if SHIFTED else None, left - 1)


@gluon.jit
def fetch_next(
    ring, stage, at, left, T: gl.constexpr, KEY_S: gl.constexpr, VALUE_S: gl.constexpr, SCALES: gl.constexpr,
):
    """Ask for a tile of which `left` tokens are there, or none, and count it as asked for: a group of copies for its
    keys, and one for its values."""
    if left >= T:
        fetch_tile(ring, stage, at, None, T, KEY_S, VALUE_S, SCALES)
    elif left > 0:
        fetch_tile(ring, stage, at, left - 1, T, KEY_S, VALUE_S, SCALES)
    else:
        async_copy.commit_group()
        async_copy.commit_group()


@gluon.jit(do_not_specialize=[
    "scale", "groups", "length", "span", "splits", "mask_b", "mask_h", "mask_t",
    "reach_b",
])
def attend_ringed(
    q, key_codes, key_scale, value_codes, value_scale, key_words, value_words, mask, reach, out, peaks, totals,
    scale, kv_heads, groups, queries, length, span, splits,
    q_b, q_h, q_t, q_d, key_b, key_h, key_scale_b, key_scale_h, value_b, value_h, value_scale_b, value_scale_h,
    mask_b, mask_h, mask_t, mask_s, reach_b,
    KEY_S: gl.constexpr, KEY_SCALE_S: gl.constexpr, VALUE_S: gl.constexpr, VALUE_SCALE_S: gl.constexpr,
    REACH: gl.constexpr, T: gl.constexpr, R: gl.constexpr, EARLY: gl.constexpr, STAGES: gl.constexpr,
    SCALES: gl.constexpr, SHIFTED: gl.constexpr, num_warps: gl.constexpr = 1,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    state = nothing_absorbed(T, R, MMA)
    SCORES: gl.constexpr = state[0].type.layout.parent
    batch = (gl.program_id(0) // kv_heads).to(gl.int64)
    head = (gl.program_id(0) % kv_heads).to(gl.int64)
    first = gl.program_id(2) * span
    count = gl.minimum(span, length - first)
    ahead, skip = first * 0, first * 0
    if SHIFTED:
        ahead, count, skip = shared_out(batch * key_scale_b + head * key_scale_h, first, length, span, splits)
    key_table, value_table = key_tables(key_words, T), value_tables(value_words, T)
    if EARLY:
        # Launched while what wrote the codes may still run: until here nothing of it is read.
        gdc_wait()
        # The combination may be put on the device now; it waits there for what this kernel writes.
        gdc_launch_dependents()
    if REACH and SCALES:
        first, count, skip = reached_in_words(reach + batch * reach_b, ahead, splits, T)
    elif REACH:
        first, count = reached(reach + batch * reach_b, splits, T)
    if REACH == 3:
        clear = gl.load(reach + batch * reach_b + 2) + ahead - first
    # For the scalars of two tokens in one word Triton has to see that it is a multiple.
    start = (first // 16 * 16).to(gl.int64) if SCALES else first.to(gl.int64)
    if SHIFTED:
        origin = (batch * key_scale_b + head * key_scale_h) // 16 * 16
        at = advanced((key_codes, key_scale, value_codes, value_scale), origin, KEY_S, 1, VALUE_S, 1)
    else:
        at = (
            key_codes + batch * key_b + head * key_h, key_scale + batch * key_scale_b + head * key_scale_h,
            value_codes + batch * value_b + head * value_h, value_scale + batch * value_scale_b + head * value_scale_h,
        )
    at = advanced(at, start, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
    q += batch * q_b + head * groups * q_h
    x = load_query(q, q_h, q_t, q_d, queries, groups, R)
    # The first tile is on its way while the rows are prepared; others would keep those of other programs waiting.
    ring = make_ring(STAGES, T, KEY_S, VALUE_S)
    tiles = (count + T - 1) // T
    scale_at, scales = (at[1], at[3]), (at[1], at[3])
    fetch_next(ring, 0, at, count, T, KEY_S, VALUE_S, SCALES)
    if not SCALES:
        last = gl.maximum(count, 1) - 1
        scales = scalars_of(scale_at, last, T, KEY_SCALE_S, VALUE_SCALE_S, SCORES)

    asked, unit = rows_of(x, q, q_h, q_t, q_d, queries, groups, scale, MMA, SCORES, R)
    for stage in range(1, STAGES):
        at = advanced(at, T, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
        fetch_next(ring, stage, at, count - stage * T, T, KEY_S, VALUE_S, SCALES)
    mask_row, query, token = masked_by(batch, head, groups, queries, mask_b, mask_h, mask_t, T, R, SCORES)
    query -= first - ahead
    address = mask_row[None, :] + (start - ahead) * mask_s + token[:, None] * mask_s

    done, part = 0, 0
    # First those that need no mask, in a loop of their own; of the others it is asked for a tile ahead, as scores would
    # wait for it. Where a tile's part of it takes more registers, one loop that branches takes less time.
    AHEAD: gl.constexpr = T * R <= 256
    for MASKED in gl.static_range(0 if REACH == 3 and AHEAD else 1, 2):
        stop = tiles if MASKED else clear_tiles(clear, count, T)
        if MASKED and AHEAD:
            mask += (start * 0 + done * T) * mask_s
            part = part_of(mask, address, query, token, skip - done * T, count - done * T, SHIFTED)
        for i in range(done, stop):
            left = count - i * T
            if MASKED and AHEAD:
                mask += T * mask_s
                following = part_of(mask, address, query, token, skip - i * T - T, left - T, SHIFTED)
            async_copy.wait_group(2 * STAGES - 1)
            if not SCALES:
                step = gl.where(left > T, T, 0)
                scale_at = scale_at[0] + step * KEY_SCALE_S, scale_at[1] + step * VALUE_SCALE_S
                later = scalars_of(scale_at, left - step - 1, T, KEY_SCALE_S, VALUE_SCALE_S, SCORES)
            keys = keys_in(ring, i % STAGES, scales[0], T, SCORES, SCALES)
            scores = scores_of(keys, asked, unit, key_table, T, R, MMA)
            if AHEAD:
                scores = read_scores(scores, mask, address, query[None, :], token[:, None], None, None, True)
                if MASKED:
                    scores, part = masked(scores, part), following
            else:
                near = skip - i * T if SHIFTED else None
                is_clear = clear - i * T >= gl.minimum(left, T) if REACH == 3 else False
                scores = read_scores(scores, mask, address, query[None, :], token[:, None], near, left - 1, is_clear)
                mask += T * mask_s
            begin = skip - i * T
            state = mixed_in(ring, i % STAGES, scores, scales[1], state, value_table, begin, left, STAGES, SCALES, MMA)
            at = advanced(at, T, KEY_S, KEY_SCALE_S, VALUE_S, VALUE_SCALE_S)
            fetch_next(ring, i % STAGES, at, left - STAGES * T, T, KEY_S, VALUE_S, SCALES)
            if not SCALES:
                scales = later
            query -= T
        done = stop
    store_sums(out, peaks, totals, state, splits, groups * queries, R)
# fmt: on


KERNELS = (
    *(codes_ring, make_ring, fetch_codes, fetch_tile, keys_in, values_in, those_there, mixed_in, part_of, fetch_next),
    *(reached_in_words, scalars_of, side_scalars, attend_ringed),
)
