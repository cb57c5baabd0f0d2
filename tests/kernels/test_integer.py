"""Caches that the kernel on int8 units takes: each must have been taken; on a CPU, the same on the portable one."""

import pytest
import torch
from cases import TOLERANCE, close, compressed, planes_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tqcompile import formats, reference
from tqcompile.coding import split
from tqcompile.kernels import attend, integer, placement, tune

CODECS = [
    *(f"turboquant:{bits}" for bits in (1, 2, "2.5", 3, "3.5", 4, 5)),
    "q8_0",
    "q4_0",
    "turboquant_prod:3",
    "kvtc:3",
]

# Scalars of lengths that are no multiple of 16 are not copied two at once.
LENGTHS = st.integers(1, 200) | st.integers(1, 14).map(lambda count: 16 * count)


@pytest.fixture(autouse=True)
def taken(device, monkeypatch):
    """What `integer.takes` said of each call: all of it must be yes on a GPU."""
    answers, takes = [], integer.takes

    def answer(*arguments):
        answers.append(takes(*arguments))
        return answers[-1]

    monkeypatch.setattr(integer, "takes", answer)
    if device == "cuda":
        monkeypatch.setitem(TOLERANCE, torch.float32, 4e-4)
    yield answers
    assert answers and all(answer == (device == "cuda") for answer in answers)


def attends_like_the_reference(q, keys, values, mask, causal, codecs, dims):
    arguments = (q, keys, values, mask, causal, dims[0] ** -0.5, *map(formats.codec, codecs), dims)
    close(attend.attend(*arguments), reference.attend(*arguments), q.dtype)


@settings(max_examples=24)
@given(data=st.data())
def test_any_shape_attends_like_the_reference(device, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    codecs = draw(st.sampled_from(CODECS)), draw(st.sampled_from(CODECS))
    dims = tuple(draw(st.sampled_from([32, 64, 80, 96, 128, 192, 256])) for _ in codecs)
    assume(integer.sides_of(tuple(map(formats.codec, codecs)), dims))
    groups, queries = draw(st.sampled_from([(1, 1), (3, 1), (4, 1), (7, 1), (8, 2), (16, 1), (2, 5)]))
    batch, heads, length = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2])), draw(LENGTHS)
    widths = [formats.codec(codec).coordinates(dim) for codec, dim in zip(codecs, dims)]
    q = torch.randn(batch, queries, heads * groups, widths[0], device=device).transpose(1, 2)
    planes = [
        compressed(formats.codec(codec), torch.randn(batch, heads, length, width, device=device), draw(st.booleans()))
        for codec, width in zip(codecs, widths)
    ]
    mask = None
    if draw(st.booleans()):
        sizes = zip((batch, heads * groups, queries, length), [draw(st.booleans()) for _ in range(4)])
        keep = torch.rand([size if whole else 1 for size, whole in sizes], device=device) < 0.8
        mask = keep if draw(st.booleans()) else torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    attends_like_the_reference(q, *planes, mask, draw(st.booleans()), codecs, dims)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize(
    ("name", "dim"),
    [(f"turboquant:{bits}", dim) for bits, dim in ((2, 64), (2, 128), (3, 256), (4, 64), (4, 128), (4, 256))]
    + [(f"turboquant:{bits}", dim) for bits, dim in ((3, 32), (3, 64), (3, 96), (3, 128), (5, 64), (5, 128))]
    + [
        ("q8_0", 128),
        ("turboquant:1", 64),
        ("turboquant:1", 128),
        ("turboquant_prod:3", 128),
        ("turboquant_prod:5", 128),
    ],
)
def test_whole_sectors_come_through_shared_memory(device, name, dim, kind):
    torch.manual_seed(6)
    codec = formats.codec(name)
    for length in (16, 77, 144) if device == "cpu" else (16, 17, 48, 64, 77, 128, 144, 272, 4095, 4096, 4103, 4112):
        width = codec.coordinates(dim)
        if len(codec.terms) > 1 and length % 16:
            continue
        keys, values = (compressed(codec, torch.randn(2, 2, length, width, device=device)) for _ in range(2))
        codes, scales = zip(*(split(codec, planes) for planes in (keys, values)))
        assert placement.in_ring(integer.sides_of((codec, codec), (dim, dim)), codes, scales, torch.device(device))
        keep = torch.rand(2, 1, 1, length, device=device) < 0.8
        mask = {"none": None, "bool": keep, "additive": torch.where(keep, 0.0, -1e4)}[kind]
        q = torch.randn(2, 8, 1, width, device=device)
        attends_like_the_reference(q, keys, values, mask, False, (name, name), (dim, dim))


@pytest.mark.parametrize("start", [1, 2, 3, 64])
def test_tokens_in_the_middle_of_a_cache_are_read_where_they_lie(device, start):
    """Planes of 3 bits at 64 dims are 24 bytes a token: their base is then no multiple of 16."""
    torch.manual_seed(0)
    codec = formats.codec("turboquant:3")
    wide = [compressed(codec, torch.randn(2, 2, 200, 64, device=device)) for _ in range(2)]
    keys, values = ([plane[:, :, start : start + 100] for plane in planes] for planes in wide)
    q = torch.randn(2, 6, 1, 64, device=device)
    attends_like_the_reference(q, keys, values, None, False, ("turboquant:3",) * 2, (64, 64))


def test_a_cache_of_tokens_times_heads_is_read_where_it_lies(device):
    torch.manual_seed(1)
    codec = formats.codec("turboquant:4")
    caches = []
    for _ in range(2):
        planes = [plane.transpose(1, 2) for plane in planes_of(codec, (2, 90, 3, 128), torch.float32, device)]
        positions = torch.arange(90, device=device)
        reference.append(codec, planes, torch.randn(2, 3, 90, 128, device=device), positions)
        caches.append(planes)
    q = torch.randn(2, 12, 1, 128, device=device)
    attends_like_the_reference(q, *caches, None, False, ("turboquant:4",) * 2, (128, 128))


def test_splits_that_see_nothing_add_nothing(device, monkeypatch):
    torch.manual_seed(2)
    monkeypatch.setattr(integer, "plan_of", lambda *a: tune.AttendPlan(4, 64, 5, 64, 1, 255))
    monkeypatch.setattr(integer, "prepared", integer.prepared.__wrapped__)
    codec = formats.codec("turboquant:4")
    keys, values = (compressed(codec, torch.randn(1, 1, 300, 64, device=device)) for _ in range(2))
    q = torch.randn(1, 3, 1, 64, device=device)
    keep = torch.arange(300, device=device).view(1, 1, 1, 300) == 130
    attends_like_the_reference(q, keys, values, keep, False, ("turboquant:4",) * 2, (64, 64))
