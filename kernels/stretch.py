"""Rows of codes in several runs or pieces on their way through shared memory: parts of the skeleton in `ringed`.

A row of nibbles and of top bits behind them, 48 bytes say, is no whole sectors, but the rows of a tile are, where they
lie without a gap. They are copied as one stretch of memory, and read where they lie in it, a row every COUNT words.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tqcompile.kernels.operands import doublings, own_words, shifted, word_layout
from tqcompile.kernels.ring import key_layout, read_rows, row_layout

# Its name since Triton 3.9, and the one before.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
# Shared memory can be gathered from since Triton 3.7; in 3.6 it can be looked at as rows with gaps.
GATHERS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "gather"))


@gluon.constexpr_function
def room_for(count):
    """The power of two of words that has room for `count`."""
    return 1 << (count - 1).bit_length()


@gluon.constexpr_function
def view_of(kept, count):
    """The words that are looked at of rows of `count` to read `kept` of each: a power of two that leaves another one; 0
    where none does."""
    while kept < count and (count - kept) & (count - kept - 1):
        kept *= 2
    return kept if kept < count else 0


@gluon.constexpr_function
def reads_of(reads, piece):
    """How many reads a piece has."""
    return len(reads[piece])


@gluon.constexpr_function
def read_of(reads, piece, turn, which):
    """Where the words of a read begin in a row (0), or how many they are (1)."""
    return reads[piece][turn][which]


@gluon.constexpr_function
def four_layout(words, kept):
    """Lane 4 g + c has an eighth g of the words of token c; see `ring.row_layout`."""
    lanes = [("token", 1), ("token", 2), ("word", words), ("word", 2 * words), ("word", 4 * words)]
    return row_layout(doublings(1, words), [], lanes, [1, 4, 8 * words // kept, kept])


@gluon.constexpr_function
def fourth(i):
    """The first of the four rows of values that are read as the `i`th (b, h, j): 32 b + 8 j + 4 h."""
    return 32 * (i // 8) + 8 * (i % 4) + 4 * (i // 4 % 2)


# fmt: off
@gluon.jit
def stretches(STAGES: gl.constexpr, T: gl.constexpr, COUNT: gl.constexpr):
    """Shared memory [STAGES, words] for what `fetch_stretch` copies of tiles."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [STAGES, room_for(T * COUNT)], FLAT)


@gluon.jit
def fetch_stretch(slot, codes, last, T: gl.constexpr, COUNT: gl.constexpr):
    """Ask for the COUNT words of each row of a tile; after row `last` its end is repeated (None: there is nothing).

    Powers of two of words at a time, the largest first, so that each starts where most of them can be copied at once.
    """
    codes = codes.to(gl.pointer_type(gl.int32), bitcast=True)
    BITS: gl.constexpr = (T * COUNT).bit_length()
    for i in gl.static_range(BITS):
        if (T * COUNT >> BITS - 1 - i) % 2:
            fetch_piece(slot, codes, last, T * COUNT >> BITS - i << BITS - i, 1 << BITS - 1 - i, COUNT)


@gluon.jit
def fetch_piece(slot, codes, last, START: gl.constexpr, WORDS: gl.constexpr, COUNT: gl.constexpr):
    """Ask for WORDS words from START on, a power of two of them."""
    AT_ONCE: gl.constexpr = min(4, WORDS // 32)
    at = START + gl.arange(0, WORDS, gl.BlockedLayout([AT_ONCE], [32], [1], [0]))
    if last is not None:
        at = gl.minimum(at // AT_ONCE, (last * COUNT + COUNT - 1) // AT_ONCE) * AT_ONCE + at % AT_ONCE
    copy_async(slot.slice(START, WORDS, 0), codes + at)


@gluon.jit
def words_along(slot, START: gl.constexpr, COUNT: gl.constexpr, STEP: gl.constexpr, LAYOUT: gl.constexpr):
    """The words of rows, [rows, words with repeats] of LAYOUT: the first at START, the next STEP further, the next row
    COUNT further."""
    ROWS: gl.constexpr = LAYOUT.shape[1]
    REPEATS: gl.constexpr = LAYOUT.shape[2]
    KEPT: gl.constexpr = LAYOUT.shape[3]
    if GATHERS:
        row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
        word = gl.arange(0, KEPT, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))) * STEP
        at = START + row[None, :, None, None] * COUNT + word[None, None, None, :]
        at += gl.full([1, ROWS, REPEATS, KEPT], 0, gl.int32, LAYOUT)
        return gl.reshape(slot.gather(gl.reshape(at, [ROWS * REPEATS * KEPT]), 0), [ROWS, REPEATS * KEPT])
    else:
        VIEW: gl.constexpr = view_of(STEP * KEPT, COUNT) // STEP
        GAPS: gl.constexpr = [[1, STEP - 1]] * (STEP > 1) + [[VIEW, COUNT - STEP * VIEW]]
        APART: gl.constexpr = gl.PaddedSharedLayout.with_identity_for(GAPS, [1, ROWS, VIEW], [2, 1, 0])
        rows = slot.slice(START, 1, 0)._reinterpret(gl.int32, [1, ROWS, VIEW], APART)
        return read_rows(rows if VIEW == KEPT else rows.slice(0, KEPT, 2), LAYOUT, REPEATS)


@gluon.jit
def eight_keys(slot, START: gl.constexpr, KEPT: gl.constexpr, COUNT: gl.constexpr, WORDS: gl.constexpr):
    """Words [1, 32, WORDS] of eight rows of keys, of which KEPT words from START on are read."""
    if (START | COUNT) % WORDS:
        # Two words at once would begin at odd ones in every other row, and such a load is none.
        LAYOUT: gl.constexpr = key_layout([1, 8], 1, 1, KEPT // 2)
        x = gl.join(
            words_along(slot, START, COUNT, 2, LAYOUT),
            words_along(slot, START + 1, COUNT, 2, LAYOUT),
        )
    else:
        x = words_along(slot, START, COUNT, 1, key_layout([1, 8], WORDS, 1, KEPT))
    return gl.convert_layout(gl.reshape(x, [1, 32, WORDS]), word_layout(1, WORDS))


@gluon.jit
def four_values(slot, START: gl.constexpr, KEPT: gl.constexpr, COUNT: gl.constexpr, WORDS: gl.constexpr):
    """The same of four rows of values."""
    x = words_along(slot, START, COUNT, 1, four_layout(WORDS, KEPT))
    x = gl.reshape(gl.permute(gl.reshape(x, [4, 8, WORDS]), [1, 0, 2]), [1, 32, WORDS])
    return gl.convert_layout(x, word_layout(1, WORDS))


@gluon.jit
def in_order(parts, COUNT: gl.constexpr, WORDS: gl.constexpr):
    """COUNT tensors of words [1, 32, WORDS] -> [COUNT, 32, WORDS], a power of two of them."""
    for step in gl.static_range(COUNT.bit_length() - 1):
        found = ()
        for part in gl.static_range(COUNT >> step + 1):
            found = found + (gl.join(parts[part], parts[part + (COUNT >> step + 1)]),)
        parts = found
    x = gl.permute(gl.reshape(parts[0], [32, WORDS, COUNT]), [2, 0, 1])
    return gl.convert_layout(x, word_layout(COUNT, WORDS))


@gluon.jit
def run_along(
    slot, READS: gl.constexpr, PIECE: gl.constexpr, TURN: gl.constexpr, COUNT: gl.constexpr, T: gl.constexpr,
    WORDS: gl.constexpr, ROWS: gl.constexpr,
):
    """Words [T / ROWS, 32, WORDS] of a tile that are read of each row at the one turn of a piece; ROWS: 8 for keys, and
    4 (b, h, j) for values."""
    START: gl.constexpr = read_of(READS, PIECE, TURN, 0)
    KEPT: gl.constexpr = read_of(READS, PIECE, TURN, 1)
    words = ()
    for i in gl.static_range(T // ROWS):
        if ROWS == 8:
            words = words + (eight_keys(slot, 8 * i * COUNT + START, KEPT, COUNT, WORDS),)
        else:
            words = words + (four_values(slot, fourth(i) * COUNT + START, KEPT, COUNT, WORDS),)
    return in_order(words, T // ROWS, WORDS)


@gluon.jit
def words_in_line(
    slot, T: gl.constexpr, LANES: gl.constexpr, READS: gl.constexpr, PIECE: gl.constexpr, COUNT: gl.constexpr,
    HIGH: gl.constexpr, FIRST: gl.constexpr, ROOM: gl.constexpr, WORDS: gl.constexpr, APART: gl.constexpr,
):
    """Words of nibbles and of top bits of a tile, where a lane's first ones lie: [T / 8, 32, WORDS] of keys, of which 4
    LANES hold a token, or [T / 4 (b, h, j), 32, WORDS] of values. READS says which words of COUNT (`Piece.reads`)."""
    ROWS: gl.constexpr = 32 // LANES
    words = run_along(slot, READS, PIECE, 0, COUNT, T, WORDS, ROWS)
    word, shift = own_words(T, LANES, WORDS, ROOM, APART)
    high = words
    if HIGH:
        word += FIRST
        high = run_along(slot, READS, PIECE, 1, COUNT, T, WORDS, ROWS)
        for turn in gl.static_range(2, reads_of(READS, PIECE)):
            later = run_along(slot, READS, PIECE, turn, COUNT, T, WORDS, ROWS)
            high = gl.where(word < (FIRST // HIGH + turn - 1) * HIGH, high, later)
        high = shifted(high, word // HIGH + shift)
    return shifted(words, shift) if LANES * WORDS > ROOM else words, high
# fmt: on


KERNELS = (
    *(room_for, four_layout, fourth, stretches, fetch_stretch, fetch_piece, words_along, eight_keys, four_values),
    *(view_of, reads_of, read_of, in_order, run_along, words_in_line),
)
