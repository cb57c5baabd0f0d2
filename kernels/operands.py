"""How packed codes become operands of int8 matrix units, inside one warp: parts of the skeleton in `fragment`.

A token's codes lie in one row of bytes, as `layout` says, and lane 4 g + c reads exactly the words of it that the
matrix unit wants of this lane (m16n8k32), out of memory here and out of a copy in `ring`:

keys are a left operand [tokens, dims]: lane (g, c) holds tokens 8 i + g, and of each a quarter c of its words;
values are a left operand [dims, tokens]: lane (g, c) holds tokens 32 b + 8 j + 4 h + c, and of each an eighth g of its
words; the four j are transposed, nibble by nibble, on the way;
weights are a right operand [tokens, 2 rows]: two int8 parts of each, 256 high + low, which is 15 bits of it.

Which dim a nibble belongs to matters to nothing here: q is loaded in that order (`query`), and results are read in it
(`Side.order`).
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 1.5 * 2**23: a float32 near it holds an integer in its low bits.
ROUND = gl.constexpr(12582912.0)
# The largest |256 high + low| of two int8 parts of q, so that sums of products with 256 dims of codes are integers.
QUERY_LIMIT = gl.constexpr(16382.0)
# The largest |256 high + low| that two int8 parts hold, with room for rounding.
WEIGHT_LIMIT = gl.constexpr(32256.0)
# Four rounded floats, each ROUND + 128 + 256 high + low - 128 -> the four high bytes, and the four low ones.
SPLIT_BYTES = gl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $2, $3, 0x5410; prmt.b32 b, $4, $5, 0x5410;"
    " prmt.b32 $0, a, b, 0x7531; prmt.b32 a, a, b, 0x6420; xor.b32 $1, a, 0x80808080; }"
)
# Four rounded floats as above, 0x51 and zero, or 0x40 and 0x80808080 -> the four high bytes, or the four low ones.
PICK_BYTES = gl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $1, $2, $5; prmt.b32 b, $3, $4, $5; prmt.b32 a, a, b, 0x5410; xor.b32 $0, a, $6; }"
)


@gluon.constexpr_function
def doublings(start, stop):
    """start, 2 start, 4 start ... under `stop`."""
    found = []
    while start < stop:
        found.append(start)
        start *= 2
    return found


@gluon.constexpr_function
def word_layout(count, words):
    """[count, 32 lanes, words]: all words in registers, neighbouring words fastest."""
    registers = [[0, 0, at] for at in doublings(1, words)] + [[at, 0, 0] for at in doublings(1, count)]
    lanes = [[0, at, 0] for at in doublings(1, 32)]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [count, 32, words])


@gluon.constexpr_function
def weight_layout(blocks, rows):
    """[blocks of 32 tokens, 8 (h, c), rows, 2 parts]: where the right operand of the values' product keeps them."""
    registers = [[0, 4, 0, 0]] + [[at, 0, 0, 0] for at in doublings(1, blocks)]
    registers += [[0, 0, at, 0] for at in doublings(4, rows)]
    lanes = [[0, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 2, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [blocks, 8, rows, 2])


@gluon.jit
def bytes_of(x):
    """int32 [...] -> int8 [..., 2, 2], lowest byte first."""
    spread = gl.join(x, x)
    spread = gl.join(spread, spread)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [spread], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def size_of(most):
    """float32 of the largest bits of numbers without their sign, or no number where one is none, or infinite; of zeros
    alone, 1. (A maximum of floats may drop what is no number.)"""
    size = gl.where(most < 0x7F800000, most.to(gl.float32, bitcast=True), float("nan"))
    return gl.where(most == 0, 1.0, size)


@gluon.jit
def larger(x, y):
    return gl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def places(LAYOUT: gl.constexpr, COUNT: gl.constexpr, WORDS: gl.constexpr):
    """The three coordinates of a tensor of words, each with two dimensions of size one."""
    i = gl.arange(0, COUNT, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return i[:, None, None], lane[None, :, None], word[None, None, :]


@gluon.jit
def word_of(part, word, LANES: gl.constexpr, WORDS: gl.constexpr, ROOM: gl.constexpr, APART: gl.constexpr):
    """Which of a piece's ROOM words a lane's `word` is, of `part` of a token's LANES, and the bits that its codes there
    are shifted by: APART lanes have other fields of a word that is shared, others its other half."""
    if LANES * WORDS == ROOM:
        return part * WORDS + word, word * 0
    else:
        turn = part // ROOM
        return part % ROOM + word, turn % APART * (4 // APART) + turn // APART * 16


@gluon.jit
def own_words(T: gl.constexpr, LANES: gl.constexpr, WORDS: gl.constexpr, ROOM: gl.constexpr, APART: gl.constexpr):
    """`word_of` for the words of a tile: of keys, of which 4 LANES hold a token, or of values, of which 8 do."""
    _, lane, word = places(word_layout(T * LANES // 32, WORDS), T * LANES // 32, WORDS)
    return word_of(lane % 4 if LANES == 4 else lane // 4, word, LANES, WORDS, ROOM, APART)


@gluon.jit
def load_words(row, word, shift, RUN: gl.constexpr, HIGH_RUN: gl.constexpr, PADDED: gl.constexpr, SHARED: gl.constexpr):
    """Words of nibbles, and of top bits where codes have three. A lane's top bits, and its part of a word that lanes
    share, are shifted to where those of the first lane lie."""
    codes = gl.load(row + word, mask=word < RUN // 4, other=0) if PADDED else gl.load(row + word)
    high = codes
    if HIGH_RUN:
        at = RUN // 4 + word % (HIGH_RUN // 4)
        high = gl.load(row + at, mask=word < RUN // 4, other=0) if PADDED else gl.load(row + at)
        high = shifted(high, word // (HIGH_RUN // 4) + shift)
    return shifted(codes, shift) if SHARED else codes, high


@gluon.jit
def shifted(x, count):
    """x >> count, filled with zeros."""
    return (x.to(gl.uint32, bitcast=True) >> count.to(gl.uint32)).to(gl.int32, bitcast=True)


@gluon.jit
def row_of(codes, near, own, last, STRIDE: gl.constexpr):
    """Where token `near + own` starts: the part that a lane knows first, so that the other becomes an immediate."""
    base = codes.to(gl.pointer_type(gl.int32), bitcast=True)
    if last is not None:
        return base + gl.minimum(near + own, last) * (STRIDE // 4)
    return base + own * (STRIDE // 4) + near * (STRIDE // 4)


@gluon.jit
def load_keys(
    codes, last, T: gl.constexpr, STRIDE: gl.constexpr, RUN: gl.constexpr, HIGH_RUN: gl.constexpr, FIRST: gl.constexpr,
    ROOM: gl.constexpr, WORDS: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """Words [T / 8, 32, WORDS] of a tile of keys; tokens after `last` repeat it (None: there are none)."""
    i, lane, word = places(word_layout(T // 8, WORDS), T // 8, WORDS)
    row = row_of(codes, 8 * i, lane // 4, last, STRIDE)
    word, shift = word_of(lane % 4, word, 4, WORDS, ROOM, APART)
    return load_words(row, FIRST + word, shift, RUN, HIGH_RUN, 4 * (FIRST + ROOM) > RUN, 4 * WORDS > ROOM)


@gluon.jit
def load_values(
    codes, last, T: gl.constexpr, STRIDE: gl.constexpr, RUN: gl.constexpr, HIGH_RUN: gl.constexpr, FIRST: gl.constexpr,
    ROOM: gl.constexpr, WORDS: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """Words [T / 4 (b, h, j), 32, WORDS] of a tile of values."""
    i, lane, word = places(word_layout(T // 4, WORDS), T // 4, WORDS)
    row = row_of(codes, 32 * (i // 8) + 8 * (i % 4) + 4 * (i // 4 % 2), lane % 4, last, STRIDE)
    word, shift = word_of(lane // 4, word, 8, WORDS, ROOM, APART)
    return load_words(row, FIRST + word, shift, RUN, HIGH_RUN, 4 * (FIRST + ROOM) > RUN, 8 * WORDS > ROOM)


@gluon.jit
def key_operand(low, high, T: gl.constexpr, DIMS: gl.constexpr):
    """Bytes of low and high nibbles, [T / 8, 32, words and fields], as the left operand [T, DIMS]."""
    x = gl.reshape(bytes_of(gl.join(low, high)), [T // 8, 8, 4, DIMS // 32, 2, 4])
    return gl.reshape(gl.permute(x, [0, 1, 3, 4, 2, 5]), [T, DIMS])


@gluon.jit
def four_tokens(words, T: gl.constexpr, WORDS: gl.constexpr):
    """[T / 4 (b, h, j), 32, WORDS] -> the four j, each [T / 16, 32, WORDS]."""
    words = gl.permute(gl.reshape(words, [T // 16, 2, 2, 32, WORDS]), [0, 3, 4, 1, 2])
    even, odd = gl.split(words)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def eight_nibbles(x, START: gl.constexpr):
    """Elements START .. START + 8 of a tuple, joined: [..., 2, 2, 2]."""
    even = gl.join(gl.join(x[START], x[START + 4]), gl.join(x[START + 2], x[START + 6]))
    odd = gl.join(gl.join(x[START + 1], x[START + 5]), gl.join(x[START + 3], x[START + 7]))
    return gl.join(even, odd)


@gluon.jit
def four_nibbles(x, START: gl.constexpr):
    """Elements START .. START + 4 of a tuple, joined: [..., 2, 2]."""
    return gl.join(gl.join(x[START], x[START + 2]), gl.join(x[START + 1], x[START + 3]))


@gluon.jit
def fields_of(x, START: gl.constexpr, STEP: gl.constexpr, COUNT: gl.constexpr):
    """Elements START, START + STEP ... of a tuple, one for each of COUNT fields, joined: [..., COUNT]."""
    if COUNT == 1:
        return x[START]
    elif COUNT == 2:
        return gl.join(x[START], x[START + STEP])
    else:
        even = gl.join(x[START], x[START + 2 * STEP])
        return gl.join(even, gl.join(x[START + STEP], x[START + 3 * STEP]))


@gluon.jit
def value_operand(nibbles, T: gl.constexpr, DIMS: gl.constexpr):
    """Four tokens' bytes of each nibble, [T / 16 (b, h), 32, words, nibbles, fields] -> left operand [DIMS, T]."""
    x = gl.reshape(bytes_of(nibbles), [T // 32, 2, 8, 4, DIMS // 8, 4])
    return gl.reshape(gl.permute(x, [4, 2, 0, 1, 3, 5]), [DIMS, T])


@gluon.jit
def weight_operand(x, T: gl.constexpr, R: gl.constexpr):
    """Weights [T, R] times their size, within WEIGHT_LIMIT -> right operand [T, 2 R]: high and low int8 parts."""
    x = gl.permute(gl.reshape(x + (ROUND + 128.0), [T // 32, 2, 2, 8, R]), [0, 3, 4, 1, 2])
    even, odd = gl.split(x)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    high, low = gl.inline_asm_elementwise(
        SPLIT_BYTES, "=&r,=&r,r,r,r,r", [first, second, third, fourth], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    x = bytes_of(gl.convert_layout(gl.join(high, low), weight_layout(T // 32, R)))
    x = gl.permute(gl.reshape(x, [T // 32, 8, R, 2, 4]), [0, 1, 4, 2, 3])
    return gl.reshape(x, [T, 2 * R])


@gluon.jit
def table_like(table, LAYOUT: gl.constexpr):
    """The look-up operands beside words of a layout: in registers of every lane, and not in uniform ones, whose copies
    would cost an instruction for most look-ups."""
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    first, second, third = (gl.load(table + lane), gl.load(table + 32 + lane), gl.load(table + 64 + lane))
    return first, second, third, gl.load(table + 96 + lane), gl.load(table + 128 + lane), gl.load(table + 160 + lane)
