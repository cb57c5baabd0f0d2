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
# Reads of a row that lies in a stretch, up to which that is done.
MOST_READS = 3
# What kernels know of each piece.
OF_TERMS = ("unit", "offset", "run", "high_run", "terms")
OF_PIECES = ("scalar", "first", "room", "words", "apart", "fields", "reads")


@dataclass(frozen=True)
class Packed:
    """Where a token's codes of one term lie in its row: bytes `run` of nibbles from `offset` on, of which each holds
    `fields` codes, then `high_run` of top bits.

    `start` is the first coordinate, of `numbers`; `unit` is what codes are looked up in.
    """

    bits: int
    start: int
    numbers: int
    unit: float
    offset: int
    run: int
    high_run: int
    fields: int

    @property
    def terms(self) -> int:
        """Look-ups that a number is the sum of."""
        return ptx.terms_of(self.bits)

    @property
    def rooms(self) -> tuple[int, ...]:
        """Words of the nibbles in powers of two, each 32 numbers at least: two of them where that leaves less padding
        than one."""
        least = max(1, 4 // self.fields)
        words = -(-self.run // (4 * least)) * least
        room = power_of_two(words)
        rest = words - room // 2
        return (room,) if power_of_two(rest) == room // 2 or room == least else (room // 2, power_of_two(rest))


@dataclass(frozen=True)
class Piece:
    """Words of codes that `lanes` hold of a token: `room` of the term's, a power of two, from word `first` on.

    `scalar` is which of the token's scalars is theirs. Where there are more lanes than words some share a word: each
    takes `fields` of it, and `nibbles` of its eight.
    """

    packed: Packed
    scalar: int
    lanes: int
    first: int
    room: int

    @property
    def words(self) -> int:
        return max(1, self.room // self.lanes)

    @property
    def apart(self) -> int:
        """Lanes that have other fields of one word."""
        return min(max(1, self.lanes // self.room), self.packed.fields)

    @property
    def fields(self) -> int:
        return self.packed.fields // self.apart

    @property
    def nibbles(self) -> int:
        return 8 * self.apart // max(1, self.lanes // self.room)

    @property
    def width(self) -> int:
        """Numbers that lanes hold of a token, padding among them."""
        return 8 * self.room * self.packed.fields

    @property
    def is_padded(self) -> bool:
        run = self.packed.run
        return 4 * (self.first + self.room) > run or 2 * self.packed.fields * run > self.packed.numbers

    @property
    def reads(self) -> tuple[tuple[int, int], ...]:
        """Where words of a row are read that lies in a stretch, and how many of them: nibbles, then top bits. Of these
        there is a read for each time that they are gone through, if they are no power of two."""
        packed, first, room = self.packed, self.first, self.room
        start, words, high = packed.offset // 4, packed.run // 4, packed.high_run // 4
        after, top = start + words, ()
        if high and power_of_two(high) == high:
            top = ((after + first % high, min(high, room)),)
        elif high:
            turns = range(first // high, (min(first + room, words) - 1) // high + 1)
            top = tuple((after + first - turn * high, room) for turn in turns)
        return ((start + first, room), *top)

    @property
    def order(self) -> tuple[int, ...]:
        """Which coordinate each number in a row of sums over values is; padding is one beyond all."""
        return tuple(map(self._coordinate_of, range(self.width)))

    def _coordinate_of(self, place: int) -> int:
        # Lane 4 g + c has, of row c, four neighbours of every 32 numbers: rows 8 n + g of the matrix unit's sums.
        lane, at, packed = place // 4 % 8, place // 32 * 4 + place % 4, self.packed
        word, nibble, field = at // self.fields // self.nibbles, at // self.fields % self.nibbles, at % self.fields
        word, turn = (lane * self.words + word) % self.room, lane * self.words // self.room
        word, field = self.first + word, field + self.fields * (turn % self.apart)
        nibble += self.nibbles * (turn // self.apart)
        number = 4 * word + nibble // 2 + packed.run * (packed.fields * (nibble % 2) + field)
        return packed.start + number if 4 * word < packed.run and number < packed.numbers else PADDING


@dataclass(frozen=True)
class Side:
    """The codes of a token in pieces, one or two for each term: what a side of the kernel is printed for."""

    pieces: tuple[Piece, ...]

    @property
    def scalars(self) -> int:
        """Scalars of a token, one for each term."""
        return self.pieces[-1].scalar + 1

    @property
    def packed(self) -> tuple[Packed, ...]:
        return tuple(dict.fromkeys(piece.packed for piece in self.pieces))

    @property
    def bits(self) -> int:
        return max(term.bits for term in self.packed)

    @property
    def head_dim(self) -> int:
        """Coordinates of all terms."""
        return sum(term.numbers for term in self.packed)

    @property
    def breadth(self) -> int:
        """`head_dim`, or what the words in registers have room for where there are several terms; codes that are bytes
        there count twice (`BlockSide`)."""
        room = sum(8 * piece.lanes * piece.words * piece.fields for piece in self.pieces)
        return self.head_dim if self.scalars == 1 else room

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's codes."""
        return sum(term.run + term.high_run for term in self.packed)

    @property
    def crowded(self) -> bool:
        """Whether a side of values takes more registers than others: three look-ups a number, and words of padding, or
        no power of two of them."""
        wide = [piece for piece in self.pieces if piece.packed.bits == 5]
        return any(piece.is_padded or len(piece.packed.rooms) > 1 for piece in wide)

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
        return len(self.pieces) > 1 or self.pieces[0].packed.high_run > 0

    def constants(self, name: str) -> str:
        """The numbers of `fragment` and `ringed` for this side."""
        pieces, count = self.pieces, self.row_bytes // 4
        values = {key.upper(): tuple(getattr(piece.packed, key) for piece in pieces) for key in OF_TERMS}
        values |= {key.upper(): tuple(getattr(piece, key) for piece in pieces) for key in OF_PIECES}
        values["DIMS"] = tuple(piece.width for piece in pieces)
        if name == "KEY":
            values |= {
                key.upper(): tuple(getattr(piece.packed, key) for piece in pieces) for key in ("start", "numbers")
            }
            values["PADDED"] = tuple(piece.is_padded for piece in pieces)
        if name == "VALUE":
            values |= {"PARTS": len(pieces), "WIDTH": self.width, "AT": tuple(accumulate(values["DIMS"], initial=0))}
            values["NIBBLES"] = tuple(piece.nibbles for piece in pieces)
        row = 0 if self.in_line else pieces[0].room
        values |= {"PIECES": len(pieces), "SCALARS": self.scalars, "BLOCKS": 0, "BREADTH": self.breadth}
        values |= {"COUNT": count, "ROW": row}
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
    packed = [_packed(term, band, layout) for term, band in zip(codec.terms, codec.bands(head_dim))]
    if None in packed:
        return None
    return Side(
        tuple(
            Piece(term, scalar, lanes, first, room)
            for scalar, term in enumerate(packed)
            for first, room in zip(accumulate(term.rooms, initial=0), term.rooms)
        )
    )


def _packed(term: Term, band: slice, layout: Layout) -> Packed | None:
    """Where the codes of a term lie whose coordinates are `band`, or None where they are no look-ups in whole words
    under a half for all of them."""
    numbers, scale = band.stop - band.start, term.scale
    if not term.is_plain or scale is None or scale.table != "half" or scale.plane.per is not None:
        return None
    if whole_numbers(term.codes, numbers) is None:
        return None
    plane = layout.plane(term.codes.plane.name)
    runs = [section.run for section in plane.sections]
    if any(run % 4 for run in runs) or plane.offset % 4:
        return None
    return Packed(
        **{"bits": term.codes.plane.bits, "start": band.start, "numbers": numbers, "offset": plane.offset},
        **{"unit": tables.unit(term.codes, numbers), "run": runs[0], "high_run": sum(runs[1:])},
        fields=plane.sections[0].fields // 2,
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
    return side.scalars <= 2 and all(_in_turns(piece, side.row_bytes // 4) for piece in side.pieces)


def _in_turns(piece: Piece, count: int) -> bool:
    """Whether the runs of a piece are read so in rows of `count` words."""
    reads = piece.reads
    # A lane's words are read at once from where they may be, or two of keys one by one.
    near = count % piece.words == 0 and not any(at % piece.words for at, _ in reads)
    near = near or (piece.words == 2 and piece.lanes == 4)
    # What is read behind the last row must lie in the power of two of words that has room for all.
    inside = max(at + kept for at, kept in reads) - count <= power_of_two(32 * count) - 32 * count
    apart = all(kept <= count and (stretch.GATHERS.value or stretch.view_of(kept, count)) for _, kept in reads)
    return near and inside and apart and len(reads) <= MOST_READS


@cache
def in_blocks(sides: Sides) -> bool:
    """Whether a side has a scalar for each block."""
    return any(isinstance(side, BlockSide) for side in sides)
