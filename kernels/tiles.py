"""A tile of codes and scalars out of memory into registers: parts of the skeletons in `fragment` and `logits`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcompile.kernels.blocks import load_key_blocks, load_scales, load_value_blocks
from tqcompile.kernels.operands import load_keys, load_values

# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
KEY_BLOCKS = KEY_PIECES = KEY_SCALARS = VALUE_BLOCKS = VALUE_PIECES = VALUE_SCALARS = gl.constexpr(0)
# One number for each piece.
KEY_OFFSET = KEY_RUN = KEY_HIGH_RUN = KEY_FIRST = KEY_ROOM = KEY_WORDS = KEY_APART = gl.constexpr(())
VALUE_OFFSET = VALUE_RUN = VALUE_HIGH_RUN = VALUE_FIRST = VALUE_ROOM = VALUE_WORDS = VALUE_APART = gl.constexpr(())


# fmt: off
@gluon.jit
def load_key_tile(codes, scale, last, T: gl.constexpr, SCORES: gl.constexpr, S: gl.constexpr, SCALE_S: gl.constexpr):
    """Words [, top bits] and scalars of each piece or block of a tile of keys; tokens after `last` repeat it (None:
    there are none)."""
    if KEY_BLOCKS:
        return load_key_blocks(codes, last, T, S), load_scales(scale, last, T, SCALE_S, KEY_BLOCKS)
    else:
        token = tokens_to(last, T, SCORES)
        words, high, scalars = (), (), ()
        for piece in gl.static_range(KEY_PIECES):
            low, top = load_keys(
                codes + KEY_OFFSET[piece], last, T, S, KEY_RUN[piece], KEY_HIGH_RUN[piece], KEY_FIRST[piece],
                KEY_ROOM[piece], KEY_WORDS[piece], KEY_APART[piece],
            )
            words, high = words + (low,), high + (top,)
        for place in gl.static_range(KEY_SCALARS):
            scalars = scalars + (gl.load(scale + place + token * SCALE_S),)
        return words, high, scalars


@gluon.jit
def load_value_tile(codes, scale, last, T: gl.constexpr, SCORES: gl.constexpr, S: gl.constexpr, SCALE_S: gl.constexpr):
    """The same of values."""
    if VALUE_BLOCKS:
        return load_value_blocks(codes, last, T, S), load_scales(scale, last, T, SCALE_S, VALUE_BLOCKS)
    else:
        token = tokens_to(last, T, SCORES)
        words, high, scalars = (), (), ()
        for piece in gl.static_range(VALUE_PIECES):
            low, top = load_values(
                codes + VALUE_OFFSET[piece], last, T, S, VALUE_RUN[piece], VALUE_HIGH_RUN[piece], VALUE_FIRST[piece],
                VALUE_ROOM[piece], VALUE_WORDS[piece], VALUE_APART[piece],
            )
            words, high = words + (low,), high + (top,)
        for place in gl.static_range(VALUE_SCALARS):
            scalars = scalars + (gl.load(scale + place + token * SCALE_S),)
        return words, high, scalars


@gluon.jit
def tokens_to(last, T: gl.constexpr, SCORES: gl.constexpr):
    """The tokens of a tile as scores have them; those after `last` repeat it."""
    token = gl.arange(0, T, gl.SliceLayout(1, SCORES))
    if last is not None:
        token = gl.minimum(token, last)
    return token


@gluon.jit
def scalars_of(at, last, T: gl.constexpr, KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr, SCORES: gl.constexpr):
    """Scalars of a tile of keys and of values out of memory; tokens after `last` repeat it."""
    return (
        side_scalars(at[0], last, T, KEY_STRIDE, KEY_BLOCKS, KEY_SCALARS, SCORES),
        side_scalars(at[1], last, T, VALUE_STRIDE, VALUE_BLOCKS, VALUE_SCALARS, SCORES),
    )


@gluon.jit
def side_scalars(
    at, last, T: gl.constexpr, STRIDE: gl.constexpr, BLOCKS: gl.constexpr, EACH: gl.constexpr, SCORES: gl.constexpr,
):
    """Scalars of a tile of one side."""
    if BLOCKS:
        return load_scales(at, last, T, STRIDE, BLOCKS)
    else:
        at += gl.minimum(gl.arange(0, T, gl.SliceLayout(1, SCORES)), last) * STRIDE
        found = ()
        for place in gl.static_range(EACH):
            found = found + (gl.load(at + place),)
        return found
# fmt: on


KERNELS = (load_key_tile, load_value_tile, tokens_to)
