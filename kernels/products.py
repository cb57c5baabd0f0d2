"""Codes of keys and values times rows and weights, on int8 matrix units: parts of the skeletons in `fragment`, `ringed`
and `logits`. A piece of codes is looked up in registers, and multiplied as bytes; its products are exact integers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tqcompile.kernels.operands import (
    eight_nibbles,
    fields_of,
    four_nibbles,
    four_tokens,
    key_operand,
    table_like,
    value_operand,
    word_layout,
)

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
key_look_up = value_look_up = None
KEY_PIECES = VALUE_PIECES = gl.constexpr(0)
# One number for each piece.
KEY_SCALAR = KEY_WORDS = KEY_FIELDS = KEY_TERMS = KEY_DIMS = gl.constexpr(())
VALUE_SCALAR = VALUE_WORDS = VALUE_FIELDS = VALUE_NIBBLES = VALUE_TERMS = VALUE_DIMS = gl.constexpr(())


@gluon.jit
def key_product(codes, high, table, asked, product, PIECE: gl.constexpr, T: gl.constexpr, MMA: gl.constexpr):
    """The integers `product`, and those of a piece of keys times the two parts of each row of q."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    FIELDS: gl.constexpr = KEY_FIELDS[PIECE]
    TERMS: gl.constexpr = KEY_TERMS[PIECE]
    x = key_look_up(codes, high, table, PIECE)
    operand = key_operand(fields_of(x, 0, 2, FIELDS), fields_of(x, 1, 2, FIELDS), T, KEY_DIMS[PIECE])
    for term in gl.static_range(1, TERMS):
        product = mma_v2(gl.convert_layout(operand, LEFT), asked, product)
        operand = key_operand(x[2 * term], x[2 * term + 1], T, KEY_DIMS[PIECE])
    return mma_v2(gl.convert_layout(operand, LEFT), asked, product)


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
    found = ()
    for place in gl.static_range(FIELDS * TERMS):
        found = found + (eight_nibbles(x, 8 * place) if VALUE_NIBBLES[PIECE] == 8 else four_nibbles(x, 4 * place),)
    for term in gl.static_range(TERMS - 1):
        product = mma_v2(gl.convert_layout(value_operand(found[term], T, DIMS), LEFT), weights, product)
    operand = value_operand(fields_of(found, TERMS - 1, 1, FIELDS), T, DIMS)
    return gl.reshape(mma_v2(gl.convert_layout(operand, LEFT), weights, product), [DIMS, R, 2])


@gluon.jit
def key_tables(table, T: gl.constexpr):
    """The look-up operands of each piece beside the words of a tile of keys."""
    found = ()
    for piece in gl.static_range(KEY_PIECES):
        words = gl.full([T // 8, 32, KEY_WORDS[piece]], 0, gl.int32, word_layout(T // 8, KEY_WORDS[piece]))
        found = with_table(found, table, words, KEY_SCALAR, piece)
    return found


@gluon.jit
def value_tables(table, T: gl.constexpr):
    """The same beside the words of four tokens of values."""
    found = ()
    for piece in gl.static_range(VALUE_PIECES):
        words = gl.full([T // 4, 32, VALUE_WORDS[piece]], 0, gl.int32, word_layout(T // 4, VALUE_WORDS[piece]))
        found = with_table(found, table, four_tokens(words, T, VALUE_WORDS[piece])[0], VALUE_SCALAR, piece)
    return found


@gluon.jit
def with_table(found, table, words, SCALAR: gl.constexpr, PIECE: gl.constexpr):
    """The look-up operands `found` of pieces, and those of the next one beside its words: pieces of one scalar have the
    same, in the same registers."""
    LAYOUT: gl.constexpr = words.type.layout
    if PIECE > 0 and SCALAR[PIECE] == SCALAR[PIECE - 1]:
        beside = ()
        for place in gl.static_range(6):
            beside = beside + (gl.convert_layout(found[PIECE - 1][place], LAYOUT),)
        return found + (beside,)
    else:
        return found + (table_like(table + 192 * SCALAR[PIECE], LAYOUT),)


KERNELS = (key_product, value_product, key_tables, value_tables, with_table)
