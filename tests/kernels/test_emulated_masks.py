"""Masks of which some tokens are read alone, by the text of the kernel on int8 units, emulated."""

import pytest
import torch
from cases import close, compressed
from reaching import SPANS, hidden_case, lie_of

from tqcompile import formats, ops, recent
from tqcompile.centre import halves, waves
from tqcompile.kernels import attend, integer, tune
from tqcompile.passes import rewrite

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["turboquant:3", "q8_0"])
@pytest.mark.parametrize("spans", SPANS, ids=str)
@pytest.mark.parametrize("length", [300, 304])
def test_what_a_mask_hides_from_all_is_not_read(name, spans, length):
    q, planes, arguments, reach, basis, expected = hidden_case(name, spans, "bool", "cpu", length)
    close(attend.attend(q, *planes, *arguments, reach=reach, basis=basis), expected, q.dtype)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["turboquant:3", "q8_0"])
@pytest.mark.parametrize("spans", SPANS[:3:2], ids=str)
@pytest.mark.parametrize(("length", "growing"), [(300, False), (304, False), (300, True)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("clear", [1, 63, 100, 148, 300])
@pytest.mark.parametrize("rows", [4, 8])
def test_a_mask_is_not_read_where_it_changes_nothing(name, spans, length, kind, clear, growing, rows, monkeypatch):
    """Of four rows it is asked for a tile ahead."""
    monkeypatch.setattr(integer, "plan_of", lambda *a: tune.AttendPlan(rows, 64, 2, 192, 1, 255))
    q, planes, arguments, reach, basis, expected = hidden_case(name, spans, kind, "cpu", length, clear, growing)
    close(attend.attend(q, *planes, *arguments, reach=reach, basis=basis), expected, q.dtype)
    if clear == 300:
        arguments = lie_of(arguments[0]), *arguments[1:]
        close(attend.attend(q, *planes, *arguments, reach=reach, basis=basis), expected, q.dtype)


def test_what_a_mask_and_causality_hide_together_is_seen_as_without_a_reach():
    """An additive mask and causality leave the first query nothing: it gets the mean of what causality shows it."""
    torch.manual_seed(10)
    codec, name = formats.codec("turboquant:4"), "turboquant:4"
    planes = [compressed(codec, torch.randn(1, 2, 40, 64)) for _ in range(2)]
    mask = torch.zeros(1, 1, 2, 40).masked_fill(torch.arange(40) < 10, torch.finfo(torch.float32).min)
    options = (None, None, True, 0.125, "", None, name, name, 64, 64, torch.float32)
    given = torch.randn(1, 4, 2, 64), *planes, mask
    expected = ops._attend_cpu(*given, None, *options)
    for attend_on in (ops._attend_cpu, ops._attend_cuda):
        close(attend_on(*given, rewrite.reach(mask), *options), expected, torch.float32)


@pytest.mark.parametrize("more", ["exact", "centre", "second"])
def test_what_is_added_to_a_mask_is_read_where_the_mask_itself_changes_nothing(more):
    torch.manual_seed(8)
    codec, name, length = formats.codec("turboquant:4"), "turboquant:4", 150
    caches = [torch.randn(2, 2, length, 64) for _ in range(2)]
    planes = [compressed(codec, x) for x in caches]
    q = torch.randn(2, 6, 1, 64)
    sides = [recent.first_and_last(x, 2, 3, 40) for x in caches]
    table = waves(length, torch.logspace(0, -3, 8), torch.arange(8))
    beside = {
        "exact": {"exact": [tensor for side in sides for tensor in side], "first": 3},
        "centre": {"centre": [torch.randn(2, 6, 1, 17), halves(table)]},
        "second": {"second": [q, *compressed(codec, torch.randn(2, 2, length, 64))], "second_codec": name},
    }[more]
    beside |= {"second_dim": 64} if more == "second" else {}
    mask = (torch.arange(length) < 140).expand(2, 1, 1, length)
    options = (None, None, False, 0.125, "", None, name, name, 64, 64, torch.float32)
    found, expected = (
        ops._attend_cuda(q, *planes, mask, reach, *options, **beside) for reach in (rewrite.reach(mask), None)
    )
    close(found, expected, torch.float32)
