"""Where each bit of a compressed token lives.

Planes of codes lie in one row of bytes, side by side, and planes of scalars in one row of numbers: a cache has a tensor
for each kind (`Store`), whatever its codec is. A code of b bits is cut into sections of 8, 4, 2 or 1 bits. A section
keeps `fields` pieces in a byte, and piece d goes to byte `d mod run` at bit `bits * (d div run)`: neighbouring bytes
hold neighbouring coordinates, so a whole run is unpacked by one shift and one mask. The expressions are stated once, in
sympy: allocation evaluates them, the kernels print them, the tests prove them injective and in bounds.
"""

from dataclasses import dataclass
from functools import cache

import sympy
import torch

from tqcompile.codec import Codec, Lookup, Plane

COORDINATE = sympy.Symbol("d", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Section:
    """Bits `shift .. shift + bits` of every code of a plane, in bytes `offset .. offset + run` of its token."""

    bits: int
    shift: int
    offset: int
    run: int

    @property
    def fields(self) -> int:
        return 8 // self.bits

    @property
    def byte(self) -> sympy.Expr:
        """Byte of the token that holds code `d`."""
        return self.offset + sympy.Mod(COORDINATE, self.run)

    @property
    def bit(self) -> sympy.Expr:
        """Lowest bit of that byte that belongs to code `d`."""
        return self.bits * sympy.floor(COORDINATE / self.run)


@dataclass(frozen=True)
class PlaneLayout:
    """One plane of one token: `count` codes in `width` elements of `dtype`, from element `offset` of its store."""

    plane: Plane
    dtype: torch.dtype
    offset: int
    width: int
    count: int
    sections: tuple[Section, ...]

    @property
    def bytes_per_token(self) -> int:
        return self.width * self.dtype.itemsize

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """[..., count] integer codes -> [..., width] uint8."""
        assert self.sections, f"plane {self.plane.name!r} stores numbers, not codes"
        codes = codes.to(torch.int32)
        packed = []
        for section in self.sections:
            pieces = (codes >> section.shift) & (2**section.bits - 1)
            pieces = torch.nn.functional.pad(pieces, (0, section.run * section.fields - self.count))
            byte = pieces[..., : section.run]
            for field in range(1, section.fields):
                byte = byte | (pieces[..., field * section.run : (field + 1) * section.run] << (field * section.bits))
            packed.append(byte)
        return torch.cat(packed, -1).to(torch.uint8)

    def pieces(self, packed: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
        """Codes as runs of coordinates that lie in one field of each section: (coordinates, int32 [..., run]).

        A run costs a shift and a mask over neighbouring bytes, so it vectorises; put end to end they are all codes.
        """
        assert self.sections, f"plane {self.plane.name!r} stores numbers, not codes"
        starts = sorted({start for section in self.sections for start in range(0, self.count, section.run)})
        return [
            (slice(start, stop), self._run(packed, start, stop))
            for start, stop in zip(starts, [*starts[1:], self.count])
        ]

    def _run(self, packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        codes = None
        for section in self.sections:
            field, byte = divmod(start, section.run)
            at = section.offset + byte
            piece = packed[..., at : at + stop - start].to(torch.int32)
            if field:
                piece = piece >> (field * section.bits)
            if field < section.fields - 1:
                piece = piece & (2**section.bits - 1)
            if section.shift:
                piece = piece << section.shift
            codes = piece if codes is None else codes | piece
        return codes

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[..., width] uint8 -> [..., count] int32 codes. The inverse of `pack`."""
        return torch.cat([codes for _, codes in self.pieces(packed)], -1)


@dataclass(frozen=True)
class Store:
    """One tensor of a cache: `width` elements of `dtype` for one token of one head."""

    name: str
    dtype: torch.dtype
    width: int


@dataclass(frozen=True)
class Layout:
    """The planes of one codec for one head_dim, dtype and kind of device, and the tensors that they lie in."""

    codec: Codec
    head_dim: int
    dtype: torch.dtype
    device_type: str
    planes: tuple[PlaneLayout, ...]
    stores: tuple[Store, ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one head takes, scalars included."""
        return sum(store.width * store.dtype.itemsize for store in self.stores)

    @property
    def bits_per_element(self) -> float:
        return 8 * self.bytes_per_token / self.head_dim

    def plane(self, name: str) -> PlaneLayout:
        return next(layout for layout in self.planes if layout.plane.name == name)

    def allocate(self, leading: tuple[int, ...], device: torch.device | str) -> tuple[torch.Tensor, ...]:
        """Zeroed planes [*leading, width]; all-zero planes decode to zeros in every codec."""
        return tuple(torch.zeros((*leading, store.width), dtype=store.dtype, device=device) for store in self.stores)


@cache
def layout_of(codec: Codec, head_dim: int, dtype: torch.dtype, device_type: str) -> Layout:
    """The layout of `codec` for vectors of `head_dim` numbers of `dtype` on a kind of device.

    Raises:
        ValueError: the codec is not defined for so small a head_dim, or dtype is not a real float.
    """
    if head_dim < codec.minimum_head_dim:
        raise ValueError(f"head_dim={head_dim}; {codec.name} needs at least {codec.minimum_head_dim}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype}; a cache holds float32, float16 or bfloat16")
    planes, widths = [], dict.fromkeys(codec.stores, 0)
    for term, band in zip(codec.terms, codec.bands(head_dim)):
        for factor in term.factors:
            planes.append(_plane_layout(factor, band.stop - band.start, dtype, widths[factor.store]))
            widths[factor.store] += planes[-1].width
    dtypes = dict(zip((factor.store for factor in codec.factors), (plane.dtype for plane in planes)))
    stores = tuple(Store(name, dtypes[name], width) for name, width in widths.items())
    return Layout(codec, head_dim, dtype, device_type, tuple(planes), stores)


def _plane_layout(factor: Lookup, coordinates: int, dtype: torch.dtype, start: int) -> PlaneLayout:
    plane, count = factor.plane, factor.plane.count(coordinates)
    if factor.table in ("half", "native"):
        kind = torch.float16 if factor.table == "half" else dtype
        return PlaneLayout(plane, kind, start, count, count, ())
    sections, offset, shift = [], start, 0
    for bits in (8, 4, 2, 1):
        if plane.bits & bits:
            run = -(-count * bits // 8)
            sections.append(Section(bits, shift, offset, run))
            offset, shift = offset + run, shift + bits
    return PlaneLayout(plane, torch.uint8, start, offset - start, count, tuple(sections))


def along_plane(index: torch.Tensor, plane: torch.Tensor) -> torch.Tensor:
    """An index [..., n] of `gather` or `scatter_`, alike for all n channels of a token, as one of a plane of tokens."""
    return index[..., :1].expand(*index.shape[:-1], plane.shape[-1])
