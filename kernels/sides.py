"""How lanes share the words of packed codes: what kernels on int8 units are printed for, and which codecs have it."""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from tqcompile import tables
from tqcompile.codec import Codec, Lookup, Term
from tqcompile.kernels import ptx, stretch
from tqcompile.kernels.address import DEVICE_TYPE, power_of_two
from tqcompile.kernels.blocks import BlockSide, block_side_of
from tqcompile.layout import Layout, layout_of

MOST_DIMS = 256
# A dim beyond all.
PADDING = 1 << 20


@dataclass(frozen=True)
class Piece:
    """How lanes share the words of a token's codes of one term: `lanes` of them hold a token together.

    `start` is its first coordinate, of `numbers`; `offset` its first byte in a row of codes. Bytes `run` of nibbles,
    then `high_run` of top bits; `words` and `fields` of nibbles a lane holds of a token; `shared` where two lanes hold
    the fields of one word; `unit` is what codes are looked up in.
    """

    lanes: int
    bits: int
    start: int
    numbers: int
    unit: float
    offset: int
    run: int
    high_run: int
    words: int
    fields: int
    shared: bool

    @property
    def terms(self) -> int:
        """Look-ups that a number is the sum of."""
        return ptx.terms_of(self.bits)

    @property
    def width(self) -> int:
        """Numbers that lanes hold of a token, padding among them."""
        return 8 * self.lanes * self.words * self.fields

    @property
    def order(self) -> tuple[int, ...]:
        """Which coordinate each number in a row of sums over values is; padding is one beyond all."""
        return tuple(map(self._coordinate_of, range(self.width)))

    def _coordinate_of(self, place: int) -> int:
        # Lane 4 g + c has, of row c, four neighbours of every 32 numbers: rows 8 n + g of the matrix unit's sums.
        lane, at, fields = place // 4 % 8, place // 32 * 4 + place % 4, self.fields
        word, nibble, field = at // (8 * fields), at // fields % 8, at % fields
        if self.shared:
            word, field, fields = lane % 4, lane // 4 * fields + field, 2 * fields
        else:
            word += lane * self.words
        number = 4 * word + nibble // 2 + self.run * (fields * (nibble % 2) + field)
        return self.start + number if 4 * word < self.run and number < self.numbers else PADDING


@dataclass(frozen=True)
class Side:
    """The codes of a token in pieces, one for each term: what a side of the kernel is printed for."""

    pieces: tuple[Piece, ...]

    @property
    def bits(self) -> int:
        return max(piece.bits for piece in self.pieces)

    @property
    def head_dim(self) -> int:
        """Coordinates of all terms."""
        return sum(piece.numbers for piece in self.pieces)

    @property
    def breadth(self) -> int:
        """`head_dim`, with padding where there are several pieces; codes that are bytes in registers count twice
        (`BlockSide`)."""
        return self.head_dim if len(self.pieces) == 1 else self.width

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's codes."""
        return sum(piece.run + piece.high_run for piece in self.pieces)

    @property
    def crowded(self) -> bool:
        """Whether a side of values takes more registers than others: three look-ups a number, and words of padding."""
        return any(piece.bits == 5 and piece.run % 32 != 0 for piece in self.pieces)

    @property
    def width(self) -> int:
        """Numbers that lanes hold of a token, padding among them."""
        return sum(piece.width for piece in self.pieces)

    @property
    def order(self) -> tuple[int, ...]:
        """Which coordinate each number in a row of sums over values is; padding is one beyond all."""
        return tuple(coordinate for piece in self.pieces for coordinate in piece.order)

    @property
    def in_line(self) -> bool:
        """Whether rows are copied as the stretch of memory that they are."""
        return len(self.pieces) > 1 or self.pieces[0].high_run > 0

    def constants(self, name: str) -> str:
        """The numbers of `fragment` and `ringed` for this side."""
        pieces, count = self.pieces, self.row_bytes // 4
        names = ["unit", "offset", "run", "high_run", "words", "fields", "terms"]
        values = {key.upper(): tuple(getattr(piece, key) for piece in pieces) for key in names}
        values["DIMS"] = tuple(piece.width for piece in pieces)
        if name == "KEY":
            values |= {key.upper(): tuple(getattr(piece, key) for piece in pieces) for key in ("start", "numbers")}
        if name == "VALUE":
            values["SHARED"] = tuple(piece.shared for piece in pieces)
            values |= {"PARTS": len(pieces), "WIDTH": self.width, "AT": tuple(accumulate(values["DIMS"], initial=0))}
        read = 4 if pieces[0].shared else pieces[0].lanes * pieces[0].words
        row = 0 if self.in_line else max(read, power_of_two(count))
        values |= {"PIECES": len(pieces), "BLOCKS": 0, "BREADTH": self.breadth, "COUNT": count, "ROW": row}
        return "\n".join(f"{name}_{key} = gl.constexpr({value})" for key, value in values.items())


Sides = tuple[Side | BlockSide, Side | BlockSide]


@cache
def side_of(codec: Codec, head_dim: int, lanes: int) -> Side | BlockSide | None:
    """The side of `codec` where `lanes` (4 for keys, 8 for values) hold a token, or None where it has none."""
    if head_dim < codec.minimum_head_dim or codec.coordinates(head_dim) > MOST_DIMS:
        return None
    if codec.is_plain and (side := block_side_of(codec, head_dim)):
        return side
    layout = layout_of(codec, head_dim, torch.float32, DEVICE_TYPE)
    pieces = [_piece_of(term, band, layout, lanes) for term, band in zip(codec.terms, codec.bands(head_dim))]
    return None if None in pieces else Side(tuple(pieces))


def _piece_of(term: Term, band: slice, layout: Layout, lanes: int) -> Piece | None:
    """The piece of a term whose coordinates are `band`, or None where its codes are no look-ups in whole words under a
    half for all of them."""
    numbers, scale = band.stop - band.start, term.scale
    if not term.is_plain or scale is None or scale.table != "half" or scale.plane.per is not None:
        return None
    if whole_numbers(term.codes, numbers) is None:
        return None
    plane = layout.plane(term.codes.plane.name)
    runs = [section.run for section in plane.sections]
    if any(run % 4 for run in runs) or plane.offset % 4:
        return None
    bits, words, fields = term.codes.plane.bits, runs[0] // 4, plane.sections[0].fields // 2
    shared = lanes == 8 and fields > 1 and words <= 4
    return Piece(
        **{"lanes": lanes, "bits": bits, "start": band.start, "numbers": numbers, "offset": plane.offset},
        **{"unit": tables.unit(term.codes, numbers), "run": runs[0], "high_run": sum(runs[1:]), "shared": shared},
        words=1 if shared else power_of_two(-(-words // lanes)),
        fields=fields // 2 if shared else fields,
    )


def whole_numbers(codes: Lookup, coordinates: int) -> tuple[int, ...] | None:
    """The numbers of a look-up that matrix units take, ascending, in units of `tables.unit`; None where it has none."""
    if codes.table == "sign":
        return -1, 1
    whole = tables.integers(codes, coordinates)
    return None if whole is None else whole[0]


@cache
def sides_of(codecs: tuple[Codec, Codec], head_dims: tuple[int, int]) -> Sides | None:
    """The sides of keys and of values, or None where either has none, or both together too many registers."""
    sides = side_of(codecs[0], head_dims[0], 4), side_of(codecs[1], head_dims[1], 8)
    if None in sides:
        return None
    # Three look-ups a number beside so many bytes would spill.
    return None if sides[0].breadth > 384 and sides[1].bits == 5 else sides


@cache
def in_sectors(sides: Sides) -> bool:
    """Whether tiles come through shared memory: where copies of all rows of codes move whole sectors and no more.

    Rows of several runs are copied together (`in_stretches`).
    """
    return all(
        in_stretches(side) if side.in_line else side.row_bytes in (64, 128) or side.row_bytes <= 32 for side in sides
    )


@cache
def in_stretches(side: Side) -> bool:
    """Whether rows that are copied as a stretch are read where they lie in it, each run as a power of two of words."""
    return len(side.pieces) <= 2 and all(_in_turns(piece, side.row_bytes // 4) for piece in side.pieces)


def _in_turns(piece: Piece, count: int) -> bool:
    """Whether the runs of a piece are read so in rows of `count` words."""
    start, kept = piece.offset // 4, power_of_two(piece.run // 4)
    after = start + piece.run // 4 if piece.high_run else start
    high = 0 if (piece.run, piece.high_run) == (24, 12) else piece.high_run // 4
    # A lane's words are read at once from where they may be, or two of keys one by one. Three words of top bits come in
    # two turns.
    near = (start | after | count) % piece.words == 0 or (piece.words == 2 and piece.lanes == 4)
    # What is read behind the last row must lie in the power of two of words that has room for all.
    last = max(start + kept, after + (high or kept))
    inside = kept <= count and last - count <= power_of_two(32 * count) - 32 * count
    gaps = [count - kept, *([count - high] if high else [])]
    apart = stretch.GATHERS.value or all(gap == power_of_two(gap) for gap in gaps)
    return near and inside and apart and high in (0, power_of_two(high))


@cache
def in_blocks(sides: Sides) -> bool:
    """Whether a side has a scalar for each block."""
    return any(isinstance(side, BlockSide) for side in sides)
