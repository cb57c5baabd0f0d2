"""Which tokens a split of a cache takes where a mask hides all but some: parts of the kernels on int8 units."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
def reached_in_words(reach, splits, T: gl.constexpr):
    """The first token of this split of those that are seen, how many it has, and how many of these are not seen.

    The first split begins at a multiple of 16, so that the scalars of two tokens lie in one word.
    """
    seen = gl.load(reach)
    begin = seen // 16 * 16
    length = gl.load(reach + 1) - begin
    span = (length + splits * T - 1) // (splits * T) * T
    first = gl.program_id(2) * span
    return begin + first, gl.maximum(gl.minimum(span, length - first), 0), seen - begin - first
