"""Tiles of codes on their way through shared memory: parts of the skeleton in `fragment`.

A program is one warp. Its ring holds some tiles; each is asked for by copies that no register waits for, long before it
is used, and then read as the matrix unit wants it (`operands`): a lane reads words of the tokens that are its own.
Rows are as wide as the lanes' words together, and a power of two: one of memory is repeated where it has fewer. Those
of several runs or pieces are for `stretch`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tqcompile.kernels.operands import doublings, own_words, shifted, word_layout

# Its name since Triton 3.9, and the one before.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def copied(words, count, stride):
    """How many words a lane copies at once, up to four, of rows of `words`, `count` of them apart from repeats, and how
    many lanes share a row."""
    vector = 4
    while any(number % vector for number in (words, count, stride)):
        vector //= 2
    return vector, min(32, words // vector)


@gluon.constexpr_function
def rows_at_once(words, count, stride):
    """Rows that one instruction copies, or a whole turn of what `slot_layout` says of them."""
    return max(8, 32 // copied(words, count, stride)[1])


@gluon.constexpr_function
def copy_layout(words, count, stride):
    """[T / rows at once, rows at once, words]: what lanes copy."""
    vector, lanes = copied(words, count, stride)
    return gl.BlockedLayout([1, 1, vector], [1, 32 // lanes, lanes], [1, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def slot_layout(words):
    """Rows of `words` in shared memory: where one fills all banks, the next one starts at others."""
    phases = min(8, words // 4) if words >= 32 else 1
    return gl.SwizzledSharedLayout(4 if phases > 1 else 1, 1, phases, [2, 1, 0])


@gluon.constexpr_function
def row_layout(words, tokens, lanes, shape):
    """[T / rows, rows, repeats, words kept]: where the words of a token are that a lane reads, those of a repeat in the
    same place.

    Registers hold words at the bits `words` of each of the tokens at the bits `tokens`; a bit of a lane is a "token" or
    a "word", and which.
    """

    def place(kind, at):
        size = shape[1] if kind == "token" else shape[3]
        near = [0, at] if at < size else [at // size, 0]
        return [*near, 0, 0] if kind == "token" else [0, 0, *near]

    registers = [place("word", at) for at in words] + [place("token", at) for at in tokens]
    return gl.DistributedLinearLayout(registers, [place(*bit) for bit in lanes], [], [], shape)


@gluon.constexpr_function
def key_layout(rows, words, blocks, kept):
    """Lane 4 g + c has tokens 8 i + g, and of each block of each a quarter c of its words."""
    lanes = [("word", words), ("word", 2 * words), ("token", 1), ("token", 2), ("token", 4)]
    registers = doublings(1, words) + doublings(4 * words, 4 * words * blocks)
    return row_layout(registers, doublings(8, rows[0] * rows[1]), lanes, [*rows, 4 * words * blocks // kept, kept])


@gluon.constexpr_function
def value_layout(rows, words, blocks, kept):
    """Lane 4 g + c has tokens 32 b + 8 j + 4 h + c, and of each block of each an eighth g of its words."""
    lanes = [("token", 1), ("token", 2), ("word", words), ("word", 2 * words), ("word", 4 * words)]
    registers = doublings(1, words) + doublings(8 * words, 8 * words * blocks)
    tokens = [8, 16, 4] + doublings(32, rows[0] * rows[1])
    return row_layout(registers, tokens, lanes, [*rows, 8 * words * blocks // kept, kept])


@gluon.constexpr_function
def pair_layout(tokens):
    """[2 tokens]: each lane has both scalars of the tokens whose scores it has."""
    return gl.DistributedLinearLayout(
        [[1]] + [[at] for at in doublings(16, 2 * tokens)], [[0], [0], [2], [4], [8]], [], [], [2 * tokens]
    )


# fmt: off
@gluon.jit
def slots(STAGES: gl.constexpr, T: gl.constexpr, WORDS: gl.constexpr, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """Shared memory [STAGES, T / rows, rows, WORDS] for what `fetch_rows` copies of tiles."""
    ROWS: gl.constexpr = rows_at_once(WORDS, COUNT, STRIDE // 4)
    return gl.allocate_shared_memory(gl.int32, [STAGES, T // ROWS, ROWS, WORDS], slot_layout(WORDS))


@gluon.jit
def fetch_rows(slot, codes, last, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """Ask for the COUNT words of each row of a tile, repeated until the slot's are full; tokens after `last` repeat it
    (None: there are none)."""
    TURNS: gl.constexpr = slot.shape[0]
    ROWS: gl.constexpr = slot.shape[1]
    WORDS: gl.constexpr = slot.shape[2]
    LAYOUT: gl.constexpr = copy_layout(WORDS, COUNT, STRIDE // 4)
    turn = gl.arange(0, TURNS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    if WORDS != COUNT:
        word = word % COUNT
    codes = codes.to(gl.pointer_type(gl.int32), bitcast=True) + word
    if last is not None:
        address = codes + gl.minimum(turn * ROWS + row, last) * (STRIDE // 4)
    else:
        # What a lane adds to the pointer comes first, so that the rest becomes an immediate.
        address = codes + row * (STRIDE // 4) + turn * (ROWS * STRIDE // 4)
    copy_async(slot, address)


@gluon.jit
def scale_slots(STAGES: gl.constexpr, T: gl.constexpr, EACH: gl.constexpr):
    """Shared memory for the scalars of tiles, EACH of a token: one or two, or none."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.float16, [STAGES, max(1, EACH) * T], FLAT)


@gluon.jit
def fetch_scales(slot, scale, last, T: gl.constexpr, EACH: gl.constexpr):
    """Ask for the scalars of T tokens, EACH of a token, that lie in a row, two at once."""
    at = gl.arange(0, EACH * T, gl.BlockedLayout([2], [32], [1], [0]))
    if last is not None:
        at = gl.minimum(at, (EACH * last + EACH - 1) // 2 * 2 + at % 2)
    copy_async(slot, scale + at)


@gluon.jit
def read_scales(slot, T: gl.constexpr, EACH: gl.constexpr, SCORES: gl.constexpr):
    """The scalars [T] of each piece of a tile."""
    if EACH == 1:
        return (slot.load(gl.SliceLayout(1, SCORES)),)
    else:
        LAYOUT: gl.constexpr = pair_layout(T)
        first, second = gl.split(gl.reshape(slot.load(LAYOUT), [T, 2]))
        TOKENS: gl.constexpr = gl.SliceLayout(1, SCORES)
        return gl.convert_layout(first, TOKENS), gl.convert_layout(second, TOKENS)


@gluon.jit
def read_rows(slot, LAYOUT: gl.constexpr, REPEATS: gl.constexpr):
    """The rows of a slot and their repeats, [T, words]."""
    TURNS: gl.constexpr = slot.shape[0]
    ROWS: gl.constexpr = slot.shape[1]
    KEPT: gl.constexpr = slot.shape[2]
    x = slot.load(gl.SliceLayout(2, LAYOUT))[:, :, None, :]
    x += gl.full([TURNS, ROWS, REPEATS, KEPT], 0, gl.int32, LAYOUT)
    return gl.reshape(x, [TURNS * ROWS, REPEATS * KEPT])


@gluon.jit
def read_keys(slot, T: gl.constexpr, WORDS: gl.constexpr, BLOCKS: gl.constexpr):
    """Words [T / 8, 32, WORDS] of each block of a tile of keys."""
    LAYOUT: gl.constexpr = key_layout([slot.shape[0], slot.shape[1]], WORDS, BLOCKS, slot.shape[2])
    x = read_rows(slot, LAYOUT, 4 * WORDS * BLOCKS // slot.shape[2])
    x = gl.permute(gl.reshape(x, [T // 8, 8, BLOCKS, 4, WORDS]), [0, 1, 3, 4, 2])
    return each_block(gl.reshape(x, [T // 8, 32, WORDS, BLOCKS]), T // 8, WORDS, BLOCKS)


@gluon.jit
def read_values(slot, T: gl.constexpr, WORDS: gl.constexpr, BLOCKS: gl.constexpr):
    """Words [T / 4 (b, h, j), 32, WORDS] of each block of a tile of values."""
    LAYOUT: gl.constexpr = value_layout([slot.shape[0], slot.shape[1]], WORDS, BLOCKS, slot.shape[2])
    x = read_rows(slot, LAYOUT, 8 * WORDS * BLOCKS // slot.shape[2])
    x = gl.permute(gl.reshape(x, [T // 32, 4, 2, 4, BLOCKS, 8, WORDS]), [0, 2, 1, 5, 3, 6, 4])
    return each_block(gl.reshape(x, [T // 4, 32, WORDS, BLOCKS]), T // 4, WORDS, BLOCKS)


@gluon.jit
def each_block(words, COUNT: gl.constexpr, WORDS: gl.constexpr, BLOCKS: gl.constexpr):
    """[COUNT, 32, WORDS, BLOCKS] -> [COUNT, 32, WORDS] of each block, a power of two of them."""
    parts = (words,)
    for step in gl.static_range(BLOCKS.bit_length() - 1):
        even, odd = (), ()
        for part in gl.static_range(1 << step):
            first, second = gl.split(gl.reshape(parts[part], [COUNT, 32, WORDS, BLOCKS >> step + 1, 2]))
            even, odd = even + (first,), odd + (second,)
        parts = even + odd
    found = ()
    for part in gl.static_range(BLOCKS):
        found = found + (gl.convert_layout(gl.reshape(parts[part], [COUNT, 32, WORDS]), word_layout(COUNT, WORDS)),)
    return found


@gluon.jit
def words_of(
    slot, T: gl.constexpr, LANES: gl.constexpr, WORDS: gl.constexpr, ROOM: gl.constexpr, APART: gl.constexpr,
):
    """Words [T / 8, 32, WORDS] of a slot of keys, of which 4 LANES hold a token, or [T / 4 (b, h, j), 32, WORDS] of
    values; a lane's part of a word that several share is shifted."""
    words = read_keys(slot, T, WORDS, 1)[0] if LANES == 4 else read_values(slot, T, WORDS, 1)[0]
    return shifted(words, own_words(T, LANES, WORDS, ROOM, APART)[1]) if LANES * WORDS > ROOM else words
# fmt: on


KERNELS = (
    *(copied, rows_at_once, copy_layout, slot_layout, row_layout, key_layout, value_layout, slots, fetch_rows),
    *(pair_layout, scale_slots, fetch_scales, read_scales, read_rows, read_keys, read_values, each_block),
    words_of,
)
