"""How planes lie in memory: whether their tiles come through shared memory, and where those begin."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tqcompile.kernels import tune
from tqcompile.kernels.sides import Sides, in_blocks, in_sectors


class Laid(NamedTuple):
    """What a plane's place is but for the plane: caches of a model lie alike, and what is found of one holds for all.

    `address` is that of its first number, modulo the 16 bytes that copies begin at.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    dtype: torch.dtype
    device: torch.device

    def stride(self, dim: int | None = None):
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def data_ptr(self) -> int:
        return self.address


def laid(planes: Sequence[torch.Tensor]) -> tuple[tuple, ...]:
    """How tensors lie: the fields of a `Laid` of each."""
    return tuple([(p.shape, p.stride(), p.data_ptr() % 16, p.dtype, p.device) for p in planes])


def in_words(plane: torch.Tensor) -> bool:
    """Whether every token of a plane starts at a whole word."""
    strides = [stride for stride, size in zip(plane.stride()[:3], plane.shape) if size > 1]
    return plane.data_ptr() % 4 == 0 and not any(stride % 4 for stride in strides)


def in_ring(sides: Sides, codes: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], device: torch.device) -> bool:
    """Whether tiles of such planes come through shared memory: copies move whole sectors of codes, the rings of a
    multiprocessor fit, and, as far as Triton sees, rows that are copied together lie without a gap and scalars two in a
    word, save those of blocks, which are not copied; or tokens of all heads are one row of them."""
    rows = all(_in_line(plane, side.row_bytes) for side, plane in zip(sides, codes) if side.in_line)
    paired = in_blocks(sides) or all(_in_line(scale, scale.shape[3]) for scale in scales)
    lie = (rows and paired) or in_one_row(sides, codes, scales)
    return in_sectors(sides) and lie and ring_tokens(sides, device) > 0


def in_one_row(sides: Sides, codes: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> bool:
    """Whether the tokens of all heads lie one behind the other, in all planes alike, and those of a head begin at no
    multiple of 16: tiles do then, as if there were one head."""
    if in_blocks(sides) or any(scale.shape[3] > 1 for scale in scales):
        return False
    if not any(stride % 16 for stride in scales[0].stride()[:2]):
        return False
    if scales[0].numel() % 4:
        # Copies of whole words, up to four, would end behind the last token.
        return False
    places = (*scales[0].stride()[:2], 1)
    widths = ((scales, (1, 1)), (codes, [side.row_bytes for side in sides]))
    return all(
        plane.stride()[:3] == tuple(place * width for place in places) and plane.data_ptr() % 16 == 0
        for planes, each in widths
        for plane, width in zip(planes, each)
    )


def with_hidden_tokens(plan: tune.AttendPlan, length: int, programs: int, device: torch.device) -> tune.AttendPlan:
    """The plan where tiles begin so (`in_one_row`), the first with up to 15 tokens of the head before: with another
    split, of so many `programs`, where these would make one longer than the others and the device holds it at once."""
    splits = -(-(length + 15) // plan.span)
    held = tune.processors_of(device) * tune.RING_PROGRAMS
    return replace(plan, splits=splits) if splits * programs <= held else plan


def ring_tokens(sides: Sides, device: torch.device) -> int:
    """Tokens of a tile of such rows that comes through shared memory; 0 where it has no room."""
    return tune.ring_tokens(*(side.row_bytes for side in sides), most_scalars(sides), device)


def most_scalars(sides: Sides) -> int:
    """Scalars of a token of the side that has more of them, of one at least."""
    return max(1, *(side.scalars for side in sides))


def _in_line(plane: torch.Tensor, width: int) -> bool:
    """Whether the tokens of a plane, of `width` numbers each, lie one behind the other from a multiple of 16 on."""
    return plane.stride(2) == width and plane.data_ptr() % 16 == 0 and not any(s % 16 for s in plane.stride()[:2])
