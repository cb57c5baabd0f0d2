"""Signed codes of eight or four bits with one scale for every 32 of them, on int8 matrix units: what `fragment` does
for a side of such codes, and which codecs have such a side.

The 32 numbers of a block are one step of the matrix unit's products (m16n8k32). It takes bytes as they are; a nibble
becomes the upper half of a byte, 16 times the code. Of every 32 bytes of a row, which are a block, or the nibbles of
two, lane 4 g + c holds bytes 8 c to 8 c + 7 of a key, and bytes 4 g to 4 g + 3 of a value; the bytes of four tokens of
values are transposed on the way. Sums inside a block are exact integers. Scales belong to a token and a
block: those of keys multiply the block's sum; those of values multiply the weights, of which each block has its own
operand, whose parts are 15 bits of the largest in the block and the tile.
"""

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tqcompile.codec import Codec
from tqcompile.kernels.address import power_of_two
from tqcompile.kernels.operands import (
    QUERY_LIMIT,
    ROUND,
    WEIGHT_LIMIT,
    bytes_of,
    doublings,
    four_tokens,
    larger,
    places,
    row_of,
    size_of,
    value_operand,
    weight_operand,
    word_layout,
)  # fmt: skip

BLOCK = 32
# Printed by `emit`; the names stand here so that the skeleton can be read, and checked, as ordinary Python.
KEY_RUN = VALUE_RUN = KEY_BLOCKS = VALUE_BLOCKS = gl.constexpr(0)
# What one of a code is in the bytes of an operand.
KEY_STEP = VALUE_STEP = gl.constexpr(1)

# Words of four tokens -> for each of their four bytes, those of the four tokens.
TRANSPOSE_BYTES = gl.constexpr(
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $6, $7, 0x5140;"
    " prmt.b32 c, $4, $5, 0x7362; prmt.b32 d, $6, $7, 0x7362; prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632;"
    " prmt.b32 $2, c, d, 0x5410; prmt.b32 $3, c, d, 0x7632; }"
)


@dataclass(frozen=True)
class BlockSide:
    """A side of the kernel whose codes are signed bytes, or nibbles, in blocks of 32."""

    bits: int
    head_dim: int
    pieces = ()
    scalars = 0
    crowded = False
    in_line = False
    order = None

    @property
    def blocks(self) -> int:
        return self.head_dim // BLOCK

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's codes."""
        return self.head_dim * self.bits // 8

    @property
    def width(self) -> int:
        """Numbers in a row of sums over values."""
        return self.head_dim

    @property
    def breadth(self) -> int:
        """Twice head_dim: codes are bytes in registers."""
        return 2 * self.head_dim

    def constants(self, name: str) -> str:
        """The numbers of `fragment` and of this module for this side."""
        blocks, count = self.blocks, self.row_bytes // 4
        values = {"BLOCKS": blocks, "PIECES": 0, "SCALARS": 0, "BREADTH": self.breadth, "RUN": self.row_bytes}
        values |= {"ROW": power_of_two(count), "COUNT": count, "STEP": 2 ** (8 - self.bits)}
        if name == "VALUE":
            values |= {"PARTS": blocks, "WIDTH": self.width, "DIMS": (BLOCK,) * blocks, "UNIT": (1.0,) * blocks}
            values["AT"] = tuple(range(0, self.width, BLOCK))
        return "\n".join(f"{name}_{key} = gl.constexpr({value})" for key, value in values.items())


def block_side_of(codec: Codec, head_dim: int) -> BlockSide | None:
    """The side of `codec`, or None where its codes are no signed bytes or nibbles in blocks of 32 under a half, or its
    rows no whole blocks of bytes."""
    plane, scale = codec.codes.plane, codec.scale
    if codec.codes.table != "signed" or plane.bits not in (4, 8) or scale is None or scale.table != "half":
        return None
    side = BlockSide(plane.bits, head_dim)
    return side if scale.plane.per == BLOCK and head_dim * plane.bits % (8 * BLOCK) == 0 else None


# fmt: off
@gluon.jit
def load_key_blocks(codes, last, T: gl.constexpr, STRIDE: gl.constexpr):
    """Words [T / 8, 32, 2] of each 32 bytes of a tile of keys; tokens after `last` repeat it (None: there are none)."""
    i, lane, word = places(word_layout(T // 8, 2), T // 8, 2)
    row = row_of(codes, 8 * i, lane // 4, last, STRIDE) + (lane % 4 * 2 + word)
    blocks = ()
    for block in gl.static_range(KEY_RUN // 32):
        blocks = blocks + (gl.load(row + 8 * block),)
    return blocks


@gluon.jit
def load_value_blocks(codes, last, T: gl.constexpr, STRIDE: gl.constexpr):
    """Words [T / 4 (b, h, j), 32, 1] of each 32 bytes of a tile of values."""
    i, lane, word = places(word_layout(T // 4, 1), T // 4, 1)
    row = row_of(codes, 32 * (i // 8) + 8 * (i % 4) + 4 * (i // 4 % 2), lane % 4, last, STRIDE) + (lane // 4 + word)
    blocks = ()
    for block in gl.static_range(VALUE_RUN // 32):
        blocks = blocks + (gl.load(row + 8 * block),)
    return blocks


@gluon.constexpr_function
def scale_width(blocks):
    """The most scales of a token, 1, 2, 4 or 8, that all loads of them can have alike."""
    return blocks & -blocks


@gluon.constexpr_function
def scale_layout(tokens, width):
    """[tokens, width]: each lane has all scales of the tokens whose scores it has."""
    registers = [[0, at] for at in doublings(1, width)] + [[at, 0] for at in doublings(8, tokens)]
    return gl.DistributedLinearLayout(registers, [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [], [], [tokens, width])


@gluon.jit
def load_scales(scale, last, T: gl.constexpr, STRIDE: gl.constexpr, BLOCKS: gl.constexpr):
    """Scales [T, width] of the blocks of a tile; tokens after `last` repeat it (None: there are none)."""
    WIDTH: gl.constexpr = scale_width(BLOCKS)
    LAYOUT: gl.constexpr = scale_layout(T, WIDTH)
    token = gl.arange(0, T, gl.SliceLayout(1, LAYOUT))
    if last is not None:
        token = gl.minimum(token, last)
    address = scale + token[:, None] * STRIDE + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    found = ()
    for block in gl.static_range(0, BLOCKS, WIDTH):
        found = found + (gl.load(address + block),)
    return found


@gluon.jit
def each_scale(scales, T: gl.constexpr, BLOCKS: gl.constexpr, LAYOUT: gl.constexpr):
    """The scales [T] of each block in float32, out of those [T, width] of several."""
    WIDTH: gl.constexpr = scale_width(BLOCKS)
    found = ()
    for place in gl.static_range(BLOCKS // WIDTH):
        parts = (scales[place].to(gl.float32),)
        for step in gl.static_range(WIDTH.bit_length() - 1):
            even, odd = (), ()
            for part in gl.static_range(1 << step):
                first, second = gl.split(gl.reshape(parts[part], [T, WIDTH >> step + 1, 2]))
                even, odd = even + (first,), odd + (second,)
            parts = even + odd
        for part in gl.static_range(WIDTH):
            found = found + (gl.convert_layout(gl.reshape(parts[part], [T]), LAYOUT),)
    return found


@gluon.jit
def query_blocks(
    q, row, q_h, q_t, q_d, queries, groups, scale, LAYOUT: gl.constexpr, SCORES: gl.constexpr, R: gl.constexpr,
):
    """Rows of q as right operands [32, 2 R], one a block, and for each the size [R] of one unit of a row."""
    k = gl.arange(0, 32, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 2 * R, gl.SliceLayout(0, LAYOUT))
    near = k // 4 % 4 * 8 + k // 16 * 4 + k % 4
    place = (row + column // 2).to(gl.int64)
    address = q + (place // queries * q_h + place % queries * q_t)[None, :] + near[:, None] * q_d
    operands, units = (), ()
    for block in gl.static_range(KEY_BLOCKS):
        inside = (near < 32)[:, None] & (place < groups * queries)[None, :]
        x = gl.load(address + 32 * block * q_d, mask=inside, other=0.0).to(gl.float32)
        size = size_of(gl.max(gl.abs(x).to(gl.int32, bitcast=True), 0))
        number = (x * (QUERY_LIMIT / size)[None, :] + (ROUND + 128.0)).to(gl.int32, bitcast=True)
        part = gl.where((column % 2 == 0)[None, :], number >> 8, number ^ 128)
        operands = operands + (part.to(gl.int8),)
        unit = gl.max(gl.reshape(size, [R, 2]), 1) * (scale / (QUERY_LIMIT * KEY_STEP))
        units = units + (gl.convert_layout(unit, gl.SliceLayout(0, SCORES)),)
    return operands, units


@gluon.jit
def each_byte(words, COUNT: gl.constexpr, STEP: gl.constexpr):
    """Words of signed bytes of each block, out of the first COUNT words of bytes, or of two nibbles, as they lie."""
    low, high = (), ()
    for place in gl.static_range(COUNT):
        if STEP == 1:
            low = low + (words[place],)
        else:
            low, high = low + ((words[place] << 4) & -0x0F0F0F10,), high + (words[place] & -0x0F0F0F10,)
    return low + high


@gluon.jit
def block_scores(blocks, scales, asked, units, T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """Scores [T, R] of a tile's keys."""
    scores = 0.0
    TOKENS: gl.constexpr = gl.SliceLayout(1, units[0].type.layout.parent)
    scales, blocks = each_scale(scales, T, KEY_BLOCKS, TOKENS), each_byte(blocks, KEY_RUN // 32, KEY_STEP)
    for block in gl.static_range(KEY_BLOCKS):
        x = gl.reshape(bytes_of(blocks[block]), [T // 8, 8, 4, 2, 4])
        keys = gl.convert_layout(gl.reshape(gl.permute(x, [0, 1, 3, 2, 4]), [T, 32]), gl.DotOperandLayout(0, MMA, 4))
        product = mma_v2(keys, asked[block], gl.full([T, 2 * R], 0, gl.int32, MMA))
        coarse, fine = gl.split(gl.reshape(product, [T, R, 2]))
        # The product with zero makes a key no number where a scale is infinite, as its decoded dims would.
        scale = scales[block] + scales[block] * 0.0
        part = (coarse * 256 + fine).to(gl.float32) * (scale[:, None] * units[block][None, :])
        scores += part
    return scores


@gluon.jit
def transposed_bytes(words, T: gl.constexpr):
    """Words [T / 4 (b, h, j), 32, 1] of 32 bytes -> for each byte of a word, a word of those of four tokens."""
    first, second, third, fourth = four_tokens(words, T, 1)
    first, second, third, fourth = gl.inline_asm_elementwise(
        TRANSPOSE_BYTES, "=&r,=&r,=&r,=&r,r,r,r,r", [first, second, third, fourth],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )
    return gl.join(gl.join(first, third), gl.join(second, fourth))


@gluon.jit
def mix_blocks(blocks, scales, weights, rescale, mixed, T: gl.constexpr, R: gl.constexpr, MMA: gl.constexpr):
    """The sums [32, R] of each block, `mixed`, after a tile of values; a scale that is no number makes them none."""
    after = ()
    TOKENS: gl.constexpr = gl.SliceLayout(1, weights.type.layout)
    scales, words = each_scale(scales, T, VALUE_BLOCKS, TOKENS), ()
    for place in gl.static_range(VALUE_RUN // 32):
        words = words + (transposed_bytes(blocks[place], T),)
    words = each_byte(words, VALUE_RUN // 32, VALUE_STEP)
    UNIT: gl.constexpr = 1.0 / (WEIGHT_LIMIT * VALUE_STEP)
    columns: gl.constexpr = gl.SliceLayout(0, mixed[0].type.layout)
    rescale = gl.convert_layout(rescale, columns)
    for block in gl.static_range(VALUE_BLOCKS):
        scaled = weights * scales[block][:, None]
        size = larger(gl.reduce(gl.abs(scaled), 0, larger), 1e-30)
        operand = weight_operand(scaled * (WEIGHT_LIMIT / size)[None, :], T, R)
        operand = gl.convert_layout(operand, gl.DotOperandLayout(1, MMA, 4))
        values = gl.convert_layout(value_operand(words[block], T, 32), gl.DotOperandLayout(0, MMA, 4))
        product = mma_v2(values, operand, gl.full([32, 2 * R], 0, gl.int32, MMA))
        coarse, fine = gl.split(gl.reshape(product, [32, R, 2]))
        part = (coarse * 256 + fine).to(gl.float32) * gl.convert_layout(size * UNIT, columns)[None, :]
        after = after + (mixed[block] * rescale[None, :] + part,)
    return after

# fmt: on


KERNELS = (
    *(load_key_blocks, load_value_blocks, scale_width, scale_layout, load_scales, each_scale),
    *(query_blocks, each_byte, block_scores, transposed_bytes, mix_blocks),
)
