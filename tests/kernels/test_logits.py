"""Scores of compressed keys on int8 units: on a GPU as compiled, without one the same text, emulated."""

import itertools
from types import SimpleNamespace

import emulate
import pytest
import torch
from cases import TOLERANCE, close, compressed

from tqcompile import formats, ops, reference
from tqcompile.kernels import decoded, logits, tune

NAMES = ["q8_0", "q4_0", *(f"turboquant:{bits}" for bits in (1, 2, 3, "3.5", 4, 5)), "turboquant_prod:3", "kvtc:2"]
ON_A_GPU = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def taken(device, monkeypatch):
    """Without a GPU the emulator runs what `takes` says no to."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 2e-4)
    if device == "cpu":
        kernel = lambda side, folder: SimpleNamespace(  # noqa: E731
            logits_fragments=emulate.Kernel(logits.source(side), "logits_fragments")
        )
        monkeypatch.setattr(logits, "module", kernel)


def scores(q, keys, name, **options):
    codec = formats.codec(name)
    head_dim = codec.head_dim(q.shape[-1])
    assert q.device.type == "cpu" or logits.takes(q, keys, codec, head_dim)
    return logits.logits(q, keys, codec, head_dim, **options)


def equals_the_reference(q, keys, name):
    codec = formats.codec(name)
    close(scores(q, keys, name), reference.logits(q, keys, codec, codec.head_dim(q.shape[-1])), torch.float32)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("name", "head_dim"),
    [pair for pair in itertools.product(NAMES, (64, 96, 128, 256)) if logits.side_of(formats.codec(pair[0]), pair[1])],
)
def test_every_codec_scores_like_the_reference_around_the_edges_of_tiles(device, name, head_dim):
    torch.manual_seed(0)
    groups, lengths = (1, 4, 7, 8), (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)
    cases = itertools.product(groups, lengths) if device == "cuda" else [(1, 65), (4, 63), (7, 129), (8, 32)]
    width = formats.codec(name).coordinates(head_dim)
    for group, length in cases:
        keys = compressed(formats.codec(name), torch.randn(2, 3, length, width, device=device))
        equals_the_reference(torch.randn(2, 3 * group, 1, width, device=device), keys, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["turboquant:3", "q8_0"])
def test_strided_queries_and_planes_are_read_where_they_lie(device, name, dtype):
    torch.manual_seed(1)
    growing = compressed(formats.codec(name), torch.randn(2, 2, 150, 64, device=device), growing=True)
    q = torch.randn(2, 5, 6, 64, device=device).to(dtype).transpose(1, 2)
    equals_the_reference(q, [plane[:, :, 3:] for plane in growing], name)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("tile", sorted({(s.block_rows, s.block_tokens) for s in tune.SETTINGS["logits"]}))
@pytest.mark.parametrize("span", [2, 5])
@pytest.mark.parametrize("name", ["turboquant:4", "q8_0"])
def test_any_setting_gives_the_same_bits(device, name, span, tile, monkeypatch):
    torch.manual_seed(2)
    keys = compressed(formats.codec(name), torch.randn(1, 2, 700, 64, device=device))
    q = torch.randn(1, 6, 3, 64, device=device)
    expected = scores(q, keys, name)
    rows, tokens = tile
    plan = tune.AttendPlan(rows, tokens, -(-700 // (span * tokens)), span * tokens, 1, 128)
    monkeypatch.setattr(logits, "plan_of", lambda *a: plan)
    assert torch.equal(scores(q, keys, name), expected)
    equals_the_reference(q, keys, name)


@pytest.mark.parametrize("name", ["turboquant:5", "q8_0"])
def test_half_precision_is_what_float32_rounds_to(device, name):
    torch.manual_seed(3)
    keys, q = compressed(formats.codec(name), torch.randn(1, 1, 77, 64, device=device)), torch.randn(1, 3, 1, 64)
    q = q.to(device)
    assert torch.equal(scores(q, keys, name, dtype=torch.bfloat16), scores(q, keys, name).bfloat16())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "dim"), [("turboquant:4", 96), ("q8_0", 96), ("q4_0", 64)])
def test_a_token_that_is_no_number_has_the_scores_it_has_in_the_reference(device, name, dim, wrong):
    torch.manual_seed(4)
    x = torch.randn(1, 2, 80, dim, device=device)
    x[0, 1, [20, 79], 40] = wrong
    equals_the_reference(torch.randn(1, 8, 1, dim, device=device), compressed(formats.codec(name), x), name)


def test_a_query_that_is_no_number_spoils_its_own_scores_alone(device):
    torch.manual_seed(5)
    keys = compressed(formats.codec("turboquant:4"), torch.randn(1, 2, 70, 64, device=device))
    q = torch.randn(1, 8, 1, 64, device=device)
    q[0, 3, 0, 17] = float("nan")
    equals_the_reference(q, keys, "turboquant:4")


def test_a_query_of_zeros_scores_zero(device):
    keys = compressed(formats.codec("turboquant:4"), torch.randn(1, 1, 70, 64, device=device))
    assert torch.equal(
        scores(torch.zeros(1, 4, 1, 64, device=device), keys, "turboquant:4").unique().cpu(), torch.zeros(1)
    )


@pytest.mark.parametrize(("length", "queries"), [(0, 1), (5, 0)])
def test_nothing_gives_scores_of_nothing(device, length, queries):
    keys = compressed(formats.codec("turboquant:4"), torch.randn(2, 2, length, 64, device=device))
    out = scores(torch.randn(2, 4, queries, 64, device=device), keys, "turboquant:4")
    assert out.shape == (2, 4, queries, length) and out.dtype == torch.float32


def test_codecs_without_a_side_are_not_taken():
    sides = {name: logits.side_of(codec, 128) for name, codec in formats.REGISTRY.items()}
    without = {"identity", "polarquant", "kvtc:1", "qjl:4", *(f"turboquant:{bits}" for bits in (6, 7, 8))}
    without |= {name for name in formats.REGISTRY if name.endswith(":trellis")}
    assert {name for name, side in sides.items() if side is None} == without
    assert logits.side_of(formats.codec("turboquant:4"), 512) is None
    assert logits.side_of(formats.codec("q4_0"), 96) is None


@ON_A_GPU
@pytest.mark.parametrize(
    ("name", "queries", "own"),
    [("turboquant:4", 32, True), ("turboquant:4", 33, False), ("turboquant:8", 1, False), ("identity", 1, False)],
)
def test_what_is_not_taken_is_decoded(device, name, queries, own, monkeypatch):
    torch.manual_seed(6)
    calls, inner = [], decoded.logits
    monkeypatch.setattr(decoded, "logits", lambda *a: calls.append(1) or inner(*a))
    keys = compressed(formats.codec(name), torch.randn(1, 2, 200, 64, device=device))
    q = torch.randn(1, 8, queries, 64, device=device)
    out = ops.logits(q, keys, name, 64)
    assert bool(calls) != own
    close(out, reference.logits(q, keys, formats.codec(name), 64), torch.float32)


@ON_A_GPU
def test_a_captured_launch_is_replayed(device):
    torch.manual_seed(7)
    keys = compressed(formats.codec("turboquant:3"), torch.randn(1, 2, 200, 64, device=device))
    q = torch.randn(1, 8, 1, 64, device=device)
    ops.logits(q, keys, "turboquant:3", 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.logits(q, keys, "turboquant:3", 64)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, ops.logits(q, keys, "turboquant:3", 64))
