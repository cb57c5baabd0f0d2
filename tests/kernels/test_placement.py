"""What is found of how planes lie is what is found of the planes."""

import pytest
import torch

from tqcompile import formats
from tqcompile.coding import split
from tqcompile.kernels import placement, sides, tune
from tqcompile.layout import layout_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["turboquant:2", "turboquant:3", "turboquant:4", "q8_0"])
def test_planes_and_how_they_lie_go_the_same_way(name):
    codec, seen = formats.codec(name), set()
    for length in (64, 68, 76, 131):
        whole = layout_of(codec, 128, torch.bfloat16, "cpu").allocate((1, 3, length), CPU)
        grown = [plane.transpose(0, 2).contiguous().transpose(0, 2) for plane in whole]
        for planes in (whole, grown, [plane[:, :, 1:] for plane in whole]):
            codes, scales = ((part,) * 2 for part in split(codec, planes))
            pair, found = sides.sides_of((codec, codec), (128, 128)), set()
            lie = [[placement.Laid(*each) for each in placement.laid(part)] for part in (codes, scales)]
            for of_codes, of_scales in ((codes, scales), lie):
                through = placement.in_ring(pair, of_codes, of_scales, CPU)
                found.add((through, through and placement.in_one_row(pair, of_codes, of_scales)))
            assert len(found) == 1
            seen |= found
    # Rows of whole sectors come alone, and scalars of blocks are not copied: these lie as they like.
    assert seen == {(True, False)} | (set() if name == "q8_0" else {(True, True), (False, False)})


@pytest.mark.parametrize(
    ("length", "programs", "splits"), [(191, 8, 4), (191, 9, 3), (177, 8, 3), (192, 1, 4), (178, 8, 4)]
)
def test_a_split_more_takes_what_lies_behind_hidden_tokens_where_it_runs_at_once(length, programs, splits):
    """The device that is planned for holds 32 programs; splits have 64 tokens."""
    plan = tune.AttendPlan(4, 32, 3, 64, 1, 255)
    assert placement.with_hidden_tokens(plan, length, programs, CPU).splits == splits
