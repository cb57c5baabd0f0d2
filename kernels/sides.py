"""How lanes share the words of packed codes: what kernels on int8 units are printed for, and which codecs have it."""

from dataclasses import dataclass
from functools import cache

import torch

from tqcompile import tables
from tqcompile.codec import Codec
from tqcompile.kernels import ptx
from tqcompile.kernels.address import DEVICE_TYPE, power_of_two
from tqcompile.kernels.blocks import BlockSide, block_side_of
from tqcompile.layout import layout_of

MOST_DIMS = 256
# A dim beyond all.
PADDING = 1 << 20


@dataclass(frozen=True)
class Side:
    """How lanes share the words of a token's codes: what a side of the kernel is printed for.

    Bytes `run` of nibbles, then `high_run` of top bits; `words` and `fields` of nibbles a lane holds of a token;
    `shared` where two lanes hold the two fields of one word; `terms` look-ups a number is the sum of.
    """

    bits: int
    head_dim: int
    run: int
    high_run: int
    words: int
    fields: int
    shared: bool

    @property
    def terms(self) -> int:
        return ptx.terms_of(self.bits)

    @property
    def breadth(self) -> int:
        """head_dim; codes that are bytes in registers count twice (`BlockSide`)."""
        return self.head_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's codes."""
        return self.run + self.high_run

    @property
    def crowded(self) -> bool:
        """Whether a side of values takes more registers than others: three look-ups a number, and words of padding."""
        return self.bits == 5 and self.run % 32 != 0

    @property
    def width(self) -> int:
        """Numbers in a row of sums over values, padding among them."""
        return 64 * self.words * self.fields

    @property
    def order(self) -> tuple[int, ...]:
        """Which dim each of these numbers is; padding is a dim beyond all."""
        return tuple(map(self._dim_of, range(self.width)))

    def _dim_of(self, place: int) -> int:
        # Lane 4 g + c has, of row c, four neighbours of every 32 numbers: rows 8 n + g of the matrix unit's sums.
        lane, at = place // 4 % 8, place // 32 * 4 + place % 4
        word, nibble, field = at // (8 * self.fields), at // self.fields % 8, at % self.fields
        if self.shared:
            word, field = lane % 4, lane // 4
        else:
            word += lane * self.words
        fields = 2 if self.shared else self.fields
        return 4 * word + nibble // 2 + self.run * (fields * (nibble % 2) + field) if 4 * word < self.run else PADDING

    def constants(self, name: str, lanes: int) -> str:
        """The numbers of `fragment` and `ringed` for this side; `lanes` hold a token together."""
        read, count = 4 if self.shared else lanes * self.words, self.row_bytes // 4
        values = {
            **{"RUN": self.run, "HIGH_RUN": self.high_run, "WORDS": self.words, "FIELDS": self.fields},
            **{"TERMS": self.terms, "DIMS": 8 * lanes * self.words * self.fields, "DIM": self.head_dim},
            **({"SHARED": self.shared} if name == "VALUE" else {}),
            **{"BLOCKS": 0, "COUNT": count, "ROW": 0 if self.high_run else max(read, power_of_two(count))},
        }
        return "\n".join(f"{name}_{key} = gl.constexpr({value})" for key, value in values.items())


Sides = tuple[Side | BlockSide, Side | BlockSide]


@cache
def side_of(codec: Codec, head_dim: int, lanes: int) -> Side | BlockSide | None:
    """The side of `codec` where `lanes` (4 for keys, 8 for values) hold a token, or None where it has none."""
    if not codec.is_plain:
        return None
    if side := block_side_of(codec, head_dim):
        return side
    bits = codec.codes.plane.bits
    if codec.codes.table != "codebook" or bits < 2 or tables.integers(codec.codes, head_dim) is None:
        return None
    sections = layout_of(codec, head_dim, torch.float32, DEVICE_TYPE).plane(codec.codes.plane.name).sections
    runs = [section.run for section in sections]
    if any(run % 4 for run in runs):
        return None
    words, fields = runs[0] // 4, 1 if bits > 3 else 2
    shared = lanes == 8 and fields == 2 and words <= 4
    per_lane = 1 if shared else power_of_two(-(-words // lanes))
    high_run = runs[1] if len(runs) > 1 else 0
    return Side(bits, head_dim, runs[0], high_run, per_lane, 1 if shared else fields, shared)


@cache
def sides_of(codecs: tuple[Codec, Codec], head_dims: tuple[int, int]) -> Sides | None:
    """The sides of keys and of values, or None where either has none, or both together too many registers."""
    if max(head_dims) > MOST_DIMS:
        return None
    sides = side_of(codecs[0], head_dims[0], 4), side_of(codecs[1], head_dims[1], 8)
    if None in sides:
        return None
    # Three look-ups a number beside so many bytes would spill.
    return None if sides[0].breadth > 384 and sides[1].bits == 5 else sides


@cache
def in_sectors(sides: Sides) -> bool:
    """Whether tiles come through shared memory: where copies of all rows of codes move whole sectors and no more.

    Rows with top bits are copied together (`in_stretches`).
    """
    return all(
        in_stretches(side) if side.high_run else side.row_bytes in (64, 128) or side.row_bytes <= 32 for side in sides
    )


@cache
def in_stretches(side: Side) -> bool:
    """Whether rows with top bits are read where they lie one behind the other, each run as a power of two of words."""
    if side.high_run == power_of_two(side.high_run):
        return side.run == power_of_two(side.run)
    # Six words of nibbles and three of top bits, which come in two turns.
    return (side.run, side.high_run) == (24, 12)


@cache
def in_blocks(sides: Sides) -> bool:
    """Whether a side has a scalar for each block."""
    return any(isinstance(side, BlockSide) for side in sides)
