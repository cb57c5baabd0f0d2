"""Which tokens a split of a cache takes, and where they and their mask lie: parts of the kernels on int8 units."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def advanced(
    at, count, KEY_S: gl.constexpr, KEY_SCALE_S: gl.constexpr, VALUE_S: gl.constexpr, VALUE_SCALE_S: gl.constexpr,
):  # fmt: skip
    """Pointers to codes and scalars of keys and of values, `count` tokens further."""
    return at[0] + count * KEY_S, at[1] + count * KEY_SCALE_S, at[2] + count * VALUE_S, at[3] + count * VALUE_SCALE_S


@gluon.jit
def masked_by(
    batch, head, groups, queries, mask_b, mask_h, mask_t, T: gl.constexpr, R: gl.constexpr, SCORES: gl.constexpr
):
    """Where the mask of each row of this program begins, the row's query, and the tokens of a tile."""
    row = gl.program_id(1) * R + gl.arange(0, R, gl.SliceLayout(0, SCORES))
    near = gl.minimum(row, groups * queries - 1)
    mask_row = batch * mask_b + (head * groups + near // queries) * mask_h + (near % queries).to(gl.int64) * mask_t
    return mask_row, near % queries, gl.arange(0, T, gl.SliceLayout(1, SCORES))


@gluon.jit
def shared_out(place, first, length, span, splits):
    """How far behind a multiple of 16 a head begins whose first token is at `place` of one row of all, how many tokens
    this split has, and how many of these are another head's.

    Tiles begin at multiples, where codes begin at a cache line, and scalars at a word: the first of a head may begin
    with the last tokens of the head before. The last split takes what these leave over, unless there is one more.
    """
    ahead = (place % 16).to(gl.int32)
    rest = length + ahead - first
    count = gl.where(gl.program_id(2) == splits - 1, rest, gl.minimum(span, rest))
    return ahead, count, ahead - first


@gluon.jit
def reached(reach, splits, T: gl.constexpr):
    """The first token of this split of those that are seen, shared out in whole tiles, and how many it has.

    One past them has none, and reads the last of them in vain.
    """
    begin = gl.load(reach)
    seen = gl.load(reach + 1) - begin
    span = (seen + splits * T - 1) // (splits * T) * T
    first = gl.program_id(2) * span
    return begin + gl.minimum(first, seen - 1), gl.maximum(gl.minimum(span, seen - first), 0)


@gluon.jit
def reached_in_words(reach, ahead, splits, T: gl.constexpr):
    """The first token of this split of those that are seen, how many it has, and how many of these are not seen.

    Places count from `ahead` tokens before the first one. The first split begins at a multiple of 16, so that the
    scalars of two tokens lie in one word.
    """
    seen = gl.load(reach) + ahead
    begin = seen // 16 * 16
    length = gl.load(reach + 1) + ahead - begin
    span = (length + splits * T - 1) // (splits * T) * T
    first = gl.program_id(2) * span
    return begin + first, gl.maximum(gl.minimum(span, length - first), 0), seen - begin - first


@gluon.jit
def clear_tiles(clear, count, T: gl.constexpr):
    """How many tiles, from the first one of `count` tokens on, have no token that needs a mask: the first does behind
    `clear` tokens."""
    return gl.where(clear >= count, gl.cdiv(count, T), gl.maximum(clear, 0) // T)


KERNELS = (advanced, masked_by, clear_tiles, shared_out, reached, reached_in_words)
