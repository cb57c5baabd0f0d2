"""A launch that is kept from one call to the next is given tensors of one kind: what differs in one has its own."""

from itertools import product
from typing import ClassVar

import pytest
import torch
from cases import compressed, planes_of

from tqcompile import formats
from tqcompile.coding import split
from tqcompile.kernels import chunks, combine, integer, launcher, launches, placement, step
from tqcompile.kernels.attend import reader_of
from tqcompile.kernels.combine import Sizes

CODEC = formats.codec("turboquant:4")
KEEPERS = (combine._call, step._call, integer.prepared, chunks.prepared)


class Kept(launcher.Call):
    """One that launches nothing, and raises where it is given tensors of other kinds than before."""

    launched: ClassVar[list] = []

    def __call__(self, tensors):
        kinds = list(map(launcher.kind_of, tensors))
        assert self.__dict__.setdefault("kinds", kinds) == kinds
        self.launched.append(self)


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    monkeypatch.setattr(launcher, "Call", Kept)
    monkeypatch.setattr(Kept, "launched", [])
    for keeper in KEEPERS:
        keeper.cache_clear()
    yield
    for keeper in KEEPERS:
        keeper.cache_clear()


def require_one_each(run, *choices):
    """Run every choice of arguments twice over: those that are alike share a launch, and no others need to."""
    for _ in range(2):
        Kept.launched.clear()
        for arguments in product(*choices):
            run(*arguments)
        seen = list(Kept.launched)
        for call, arguments in zip(seen, product(*choices)):
            run(*arguments)
            assert Kept.launched[-1] is call


def each(dtypes, *shape):
    """None, a tensor of each dtype, and one of the first elsewhere."""
    here = [torch.zeros(shape, dtype=dtype) for dtype in dtypes]
    return [None, *here, torch.zeros(shape, dtype=dtypes[0], device="meta")]


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def test_what_adds_up_splits():
    sizes = Sizes(2, 3, 5, 8)
    left = sizes.parts(torch.empty(0))
    others, order = (left[1], left[2], torch.empty_like(left[1])), torch.zeros(8, dtype=torch.int32)

    def run(dtype, basis, sinks, others, order):
        combine.combine(left, sizes, (1, 2, 5, 8), None, basis, dtype, sinks, others, order)

    choices = each(FLOATS, 8, 8), each((torch.float32, torch.float64), 10), (None, others), (None, order)
    require_one_each(run, FLOATS, *choices)


def test_what_a_step_writes():
    tokens = torch.randn(1, 2, 1, 64)
    codes = [planes_of(CODEC, (1, 2, 1, 64), torch.float32, "cpu") for _ in range(2)]

    def run(positions, key_basis, value_basis):
        step.append_step((CODEC, CODEC), codes, (tokens, tokens), tokens, positions, (key_basis, value_basis))

    places = [None, *(torch.zeros(1, dtype=dtype) for dtype in (torch.int64, torch.int32))]
    require_one_each(run, places, each(FLOATS, 64, 64)[1:], each(FLOATS, 64, 64))


@pytest.mark.parametrize("kernel", [integer, chunks], ids=lambda kernel: kernel.__name__)
def test_attention(kernel):
    q = torch.randn(2, 4, 10, 64).bfloat16()
    planes = [plane for _ in range(2) for plane in split(CODEC, compressed(CODEC, torch.randn(2, 2, 40, 64)))]
    laid = placement.laid((q, *planes))

    def run(mask, reach):
        how = 0.1, reader_of(mask, False), None
        mask = None if mask is None else (mask, (400, 0, 40, 1))
        launches.launched(kernel.prepared, q, planes, mask, reach, (CODEC, CODEC), (64, 64), how, laid)

    reaches = each((torch.int32, torch.int64), 2, 2)
    reaches += [torch.zeros(1, width, dtype=torch.int32).expand(2, width) for width in (2, 3)]
    marks = *each(FLOATS, 2, 1, 10, 40), torch.zeros(2, 1, 10, 40, dtype=torch.bool)
    require_one_each(run, marks, reaches)
    assert Kept.launched[-1] is not Kept.launched[-2]


def test_what_splits_leave_begins_where_kernels_like_it():
    for sizes in (Sizes(1, 1, 3, 5), Sizes(3, 1, 1, 7), Sizes(1, 5, 1, 128)):
        sums, *others = sizes.parts(torch.empty(0))
        assert all(part.data_ptr() % 16 == 0 for part in (sums, *others))
        assert sums.numel() >= sizes.heads * sizes.splits * sizes.rows * sizes.width
        assert min(part.numel() for part in others) >= sizes.heads * sizes.splits * sizes.rows
