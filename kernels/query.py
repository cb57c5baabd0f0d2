"""Rows of queries as operands of an int8 matrix unit: parts of the skeletons in `fragment`, `ringed` and `logits`.

A row is 15 bits of the largest number in it, in two columns of bytes: a number is 256 times the first and the second.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.kernels.blocks import query_blocks
from tqcompile.kernels.operands import PICK_BYTES, QUERY_LIMIT, ROUND, bytes_of, doublings, size_of

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
KEY_BLOCKS = KEY_PIECES = gl.constexpr(0)
# One number for each piece.
KEY_START = KEY_NUMBERS = KEY_PADDED = KEY_UNIT = KEY_RUN = KEY_DIMS = gl.constexpr(())
KEY_SCALAR = KEY_FIRST = KEY_ROOM = KEY_WORDS = KEY_FIELDS = KEY_APART = gl.constexpr(())


@gluon.constexpr_function
def query_layout(folds, words, columns):
    """[folds, dims of a fold, columns]: lane 4 g + c has a quarter c of the dims, and column g of every eight."""
    registers = [[0, at, 0] for at in doublings(1, 4 * words)] + [[at, 0, 0] for at in doublings(1, folds)]
    registers += [[0, 0, at] for at in doublings(8, columns)]
    lanes = [[0, 4 * words, 0], [0, 8 * words, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [folds, 16 * words, columns])


@gluon.constexpr_function
def picked_layout(words, fields, columns):
    """[words, fields, 2, 4 lanes, columns]: the same for words of four bytes of an operand."""
    registers = [[0, 0, 1, 0, 0]] + [[0, at, 0, 0, 0] for at in doublings(1, fields)]
    registers += [[at, 0, 0, 0, 0] for at in doublings(1, words)] + [[0, 0, 0, 0, at] for at in doublings(8, columns)]
    lanes = [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [0, 0, 0, 0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [words, fields, 2, 4, columns])


@gluon.jit
def load_query(q, q_h, q_t, q_d, queries, groups, R: gl.constexpr):
    """Rows of q as `load_piece` reads them for each piece of the keys. (For keys in blocks: nothing.)"""
    if KEY_BLOCKS:
        return q
    else:
        found = ()
        for piece in gl.static_range(KEY_PIECES):
            found = found + (load_piece(q, q_h, q_t, q_d, queries, groups, piece, R),)
        return found


@gluon.jit
def load_piece(q, q_h, q_t, q_d, queries, groups, PIECE: gl.constexpr, R: gl.constexpr):
    """Rows of q, each twice, [folds, dims of a fold, 2 R]: the dims of the codes that nibbles and fields of one place
    hold are a fold. Rows past the last repeat it."""
    FOLDS: gl.constexpr = 2 * KEY_FIELDS[PIECE]
    RUN: gl.constexpr = KEY_RUN[PIECE]
    LAYOUT: gl.constexpr = query_layout(FOLDS, KEY_WORDS[PIECE], 2 * R)
    fold = gl.arange(0, FOLDS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    place = gl.arange(0, 16 * KEY_WORDS[PIECE], gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    column = gl.arange(0, 2 * R, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    row = gl.minimum(gl.program_id(1) * R + column // 2, groups * queries - 1).to(gl.int64)
    if KEY_APART[PIECE] > 1:
        # Lanes that share a word have other fields of it.
        fold = fold // KEY_FIELDS[PIECE] * KEY_APART[PIECE] * KEY_FIELDS[PIECE] + fold % KEY_FIELDS[PIECE]
        fold += place // (4 * KEY_ROOM[PIECE]) * KEY_FIELDS[PIECE]
        place = place % (4 * KEY_ROOM[PIECE])
    place += 4 * KEY_FIRST[PIECE]
    address = q + (row // queries * q_h + row % queries * q_t) + (KEY_START[PIECE] + fold * RUN + place) * q_d
    if not KEY_PADDED[PIECE]:
        return gl.load(address)
    else:
        inside = (place < RUN) & (fold * RUN + place < KEY_NUMBERS[PIECE])
        return gl.load(address, mask=inside, other=0.0)


@gluon.jit
def four_dims(x, PIECE: gl.constexpr, R: gl.constexpr):
    """What `load_piece` reads -> the four numbers of four bytes of keys, each [.., 2 R] in the keys' order of dims."""
    x = gl.reshape(x, [2, KEY_FIELDS[PIECE], 4, KEY_WORDS[PIECE], 2, 2, 2 * R])
    low, high = gl.split(gl.permute(x, [3, 1, 4, 2, 6, 5, 0]))
    first, third = gl.split(low)
    second, fourth = gl.split(high)
    return first, second, third, fourth


@gluon.jit
def largest_bits(x):
    """The largest bits [2 R] of what `load_piece` read, as float32 without a sign."""
    return gl.max(gl.max(gl.abs(x.to(gl.float32)).to(gl.int32, bitcast=True), 1), 0)


@gluon.jit
def sizes_of(x, PIECE: gl.constexpr):
    """The size [2 R] of rows of a piece, and of those after it that have its scalar: what `load_piece` read of each."""
    most = largest_bits(x[PIECE])
    for other in gl.static_range(PIECE + 1, KEY_PIECES):
        if KEY_SCALAR[other] == KEY_SCALAR[PIECE]:
            most = gl.maximum(most, gl.convert_layout(largest_bits(x[other]), most.type.layout))
    return size_of(most)


@gluon.jit
def query_operand(x, size, PIECE: gl.constexpr, LAYOUT: gl.constexpr, R: gl.constexpr):
    """What `load_piece` read as the right operand [KEY_DIMS, 2 R] in the keys' order of dims, of rows of some size."""
    x = x.to(gl.float32)
    size = gl.convert_layout(size, gl.SliceLayout(0, gl.SliceLayout(1, x.type.layout)))
    first, second, third, fourth = four_dims(x * (QUERY_LIMIT / size)[None, None, :] + (ROUND + 128.0), PIECE, R)
    COLUMNS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, first.type.layout)))
    column = gl.arange(0, 2 * R, gl.SliceLayout(0, COLUMNS))[None, None, None, None, :]
    selector, mask = gl.where(column % 2 == 0, 0x51, 0x40), gl.where(column % 2 == 0, 0, -0x7F7F7F80)
    numbers = [first, second, third, fourth, selector, mask]
    x = gl.inline_asm_elementwise(PICK_BYTES, "=r,r,r,r,r,r,r", numbers, dtype=gl.int32, is_pure=True, pack=1)
    x = bytes_of(gl.convert_layout(x, picked_layout(KEY_WORDS[PIECE], KEY_FIELDS[PIECE], 2 * R)))
    x = gl.permute(x, [0, 1, 2, 3, 5, 6, 4])
    return gl.convert_layout(gl.reshape(x, [KEY_DIMS[PIECE], 2 * R]), LAYOUT)


# fmt: off
@gluon.jit
def rows_of(
    x, q, q_h, q_t, q_d, queries, groups, scale, MMA: gl.constexpr, SCORES: gl.constexpr, R: gl.constexpr,
):
    """The rows of this program, x of `load_query`, as operands for each piece or block of the keys, and what a unit of
    their scores is for each scalar."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    if KEY_BLOCKS:
        return query_blocks(q, gl.program_id(1) * R, q_h, q_t, q_d, queries, groups, scale, RIGHT, SCORES, R)
    else:
        operands, units = (), ()
        for piece in gl.static_range(KEY_PIECES):
            if piece == 0 or KEY_SCALAR[piece] != KEY_SCALAR[piece - 1]:
                size = sizes_of(x, piece)
                unit = gl.max(gl.reshape(size, [R, 2]), 1) / QUERY_LIMIT
                units = units + (gl.convert_layout(unit, gl.SliceLayout(0, SCORES)) * (scale * KEY_UNIT[piece]),)
            operands = operands + (query_operand(x[piece], size, piece, RIGHT, R),)
        return operands, units
# fmt: on


KERNELS = (
    *(size_of, query_layout, picked_layout, load_query, load_piece, four_dims, largest_bits, sizes_of),
    *(query_operand, rows_of),
)
