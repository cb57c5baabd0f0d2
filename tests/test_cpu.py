"""What the CPU path compiles, against the reference that it is compiled from."""

import math

import pytest
import torch

from tqcompile import backend, coding, cpu, formats, ops, reference, tables
from tqcompile.layout import layout_of
from tqcompile.passes import rewrite


@pytest.fixture(autouse=True)
def compiled_rows():
    """As a compilation with Inductor installs it; the next test starts without."""
    cpu.use_row_compiler(backend.compile_rows)


# Codec, head_dim, queries a head: runs of a vector and of less, even and ragged ones, scales by block, a table.
SHAPES = [
    ("turboquant:5", 64, 3),
    ("turboquant:3", 48, 1),
    ("turboquant:5", 80, 2),
    ("turboquant:3", 20, 2),
    ("turboquant:2", 96, 7),
    ("turboquant:8", 64, 1),
    ("q8_0", 80, 3),
]
LENGTHS = [1, 17, cpu.CHUNK - 1, cpu.CHUNK, cpu.CHUNK + 1, 3 * cpu.CHUNK + 5]
PATHS = [("turboquant:3:trellis", 20, 2)]
EVERY_SHAPE = pytest.mark.parametrize("name, head_dim, group", SHAPES)


def planes_of(codec, *shape: int, room: int = 0, tokens_first: bool = False):
    """Codes of random rows, in planes that lie as a cache does: with room to grow, or token after token."""
    batch, heads, length, head_dim = shape
    planes = coding.encode(codec, torch.randn(batch, heads, length + room, head_dim))
    if tokens_first:
        planes = [plane.transpose(1, 2).contiguous().transpose(1, 2) for plane in planes]
    return [plane[:, :, :length] for plane in planes]


def check(codec, planes, head_dim: int, group: int) -> None:
    batch, heads, length = planes[0].shape[:3]
    q, weights = (
        torch.randn(batch, heads * group, 1, head_dim),
        torch.randn(batch, heads * group, 1, length).softmax(-1),
    )
    found = cpu.logits(q, planes, codec, head_dim), cpu.mix(weights, planes, codec, head_dim)
    truth = reference.logits(q, planes, codec, head_dim), reference.mix(weights, planes, codec, head_dim)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name, head_dim, group", SHAPES + PATHS)
def test_single_queries_see_what_the_reference_decodes_at_every_length(name, head_dim, group):
    codec = formats.codec(name)
    for length in LENGTHS:
        for batch, heads in ((1, 1), (2, 3)):
            check(codec, planes_of(codec, batch, heads, length, head_dim, room=9), head_dim, group)


def test_planes_may_lie_in_any_order_and_nothing_is_compiled_again(monkeypatch):
    codec = formats.codec("turboquant:5")
    check(codec, planes_of(codec, 1, 3, 200, 64), 64, 3)
    # Sequences whose heads do not fold into one dimension go block by block, and are not copied.
    check(codec, planes_of(codec, 2, 3, 40, 64, tokens_first=True), 64, 3)
    monkeypatch.setattr(cpu, "_compile_rows", lambda *_: pytest.fail("compiled again"))
    check(codec, planes_of(codec, 1, 3, 200, 64, tokens_first=True), 64, 3)
    check(codec, planes_of(codec, 2, 3, 33, 64, tokens_first=True), 64, 3)
    check(codec, planes_of(codec, 3, 1, 1000, 64, room=1), 64, 3)


def test_blocks_of_a_long_cache_leave_no_trace(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1)
    codec = formats.codec("turboquant:3")
    for length in (cpu.CHUNK + 1, 3 * cpu.CHUNK, 3 * cpu.CHUNK + 5):
        check(codec, planes_of(codec, 1, 2, length, 64), 64, 3)


@pytest.mark.parametrize("name", ["turboquant:5", "q8_0"])
@pytest.mark.parametrize("mask", [None, "bool", "additive", "blind", "causal"])
def test_attention_of_single_queries_is_that_of_the_reference(name, mask):
    key, value = formats.codec(name), formats.codec("turboquant:3")
    keys, values = planes_of(key, 2, 2, 150, 64), planes_of(value, 2, 2, 150, 64)
    keep = torch.rand(2, 1, 1, 150) > 0.3
    masks = {"bool": keep, "additive": torch.where(keep, 0.5, -math.inf), "blind": torch.zeros_like(keep)}
    q, rest = torch.randn(2, 6, 1, 64), (masks.get(mask), mask == "causal", 0.125, key, value, (64, 64))
    truth = reference.attend(q, keys, values, *rest)
    torch.testing.assert_close(cpu.attend(q, keys, values, *rest)[0], truth, rtol=1e-5, atol=2e-6)


def test_more_queries_a_head_than_registers_take_the_path_of_blocks():
    codec = formats.codec("turboquant:3")
    check(codec, planes_of(codec, 1, 2, 40, 64), 64, cpu.MOST_QUERIES + 1)


def test_zeros_decode_to_zeros_and_a_token_that_is_not_finite_shows():
    codec = formats.codec("turboquant:5")
    y = torch.randn(1, 2, 150, 64)
    y[0, 0, 5], y[0, 1, 7], y[0, 0, 9] = 0.0, math.nan, 1e7
    planes, q = coding.encode(codec, y), torch.randn(1, 2, 1, 64)
    scores, truth = cpu.logits(q, planes, codec, 64), reference.logits(q, planes, codec, 64)
    assert scores[0, 0, 0, 5] == 0 and torch.equal(scores.isfinite(), truth.isfinite())
    mixed = cpu.mix(torch.rand(1, 2, 1, 150), planes, codec, 64)
    assert not mixed.isfinite().any(), "both heads hold a token that is not finite"


@pytest.mark.parametrize("name, head_dim, group", SHAPES)
def test_wide_runs_are_the_codes_of_the_layout(name, head_dim, group):
    codec = formats.codec(name)
    layout = layout_of(codec, head_dim, torch.float32, "cpu").plane(codec.codes.plane.name)
    codes = torch.randint(2**codec.codes.plane.bits, (5, head_dim), dtype=torch.int32)
    runs = cpu.wide_runs(layout, layout.pack(codes))
    assert [at for span, _ in runs for at in range(span.start, span.stop)] == list(range(head_dim))
    assert torch.equal(torch.cat([run for _, run in runs], -1), codes)


@pytest.mark.parametrize("name", ["q8_0", "turboquant:4"])
def test_compiled_rows_decode_as_the_reference_does(name):
    codec = formats.codec(name)
    planes = coding.encode(codec, torch.randn(2, 3, 65, 64))
    assert torch.equal(cpu.decode_rows(codec, planes, 64), coding.decode(codec, planes, 64))


def test_compiled_codes_round_as_the_reference_does():
    # No sum is taken for these codes, so that no order of summing moves one: a scale rounds to float16 or it does not.
    codec, y = formats.codec("q8_0"), torch.randn(2, 3, 65, 64)
    assert all(map(torch.equal, cpu.encode_rows(codec, y), coding.encode(codec, y)))


def test_what_an_encoder_takes_for_constants_is_made_before_it_is_traced(monkeypatch):
    monkeypatch.setattr(cpu, "_functions", {})
    tables.overlap.cache_clear()
    codec, y = formats.codec("turboquant_prod:3"), torch.randn(2, 2, 3, 64)
    assert all(map(torch.equal, cpu.encode_rows(codec, y), coding.encode(codec, y)))


def test_one_token_of_several_heads_lies_apart_in_memory():
    codec, y = formats.codec("q8_0"), torch.randn(1, 3, 65, 64)
    planes = coding.encode(codec, y)
    last = [plane[:, :, 64:] for plane in planes]
    assert torch.equal(cpu.decode_rows(codec, last, 64), coding.decode(codec, last, 64))
    assert all(map(torch.equal, cpu.encode_rows(codec, y[:, :, 64:]), last))


def test_tokens_whose_dims_are_apart_in_memory_are_copied_and_not_misread():
    codec = formats.codec("q8_0")
    y = torch.randn(1, 3, 5, 128)[..., ::2]
    for found, truth in zip(cpu.encode_rows(codec, y), coding.encode(codec, y)):
        assert torch.equal(found, truth)
    planes, q = planes_of(codec, 1, 4, 20, 64), torch.randn(1, 1, 64, 4).permute(0, 3, 1, 2)
    found, truth = cpu.logits(q, planes, codec, 64), reference.logits(q, planes, codec, 64)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=2e-5)


def test_strides_that_happen_to_be_equal_are_not_taken_for_one():
    """At 384 dims and four queries a chunk's stride in the examples is that of a token of 8-bit codes."""
    codec = formats.codec("q8_0")
    check(codec, planes_of(codec, 1, 1, 2 * cpu.CHUNK, 384), 384, 4)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("spans", [[(10, 40), (30, 77)], [(0, 1), (0, 1)], [(0, 90), (4, 5)]], ids=str)
def test_what_a_mask_hides_from_all_sequences_is_not_read(spans, queries):
    torch.manual_seed(0)
    codec, token = formats.codec("turboquant:4"), torch.arange(90)
    keep = torch.stack([(token >= first) & (token < stop) for first, stop in spans])[:, None, None]
    first, stop = min(span[0] for span in spans), max(span[1] for span in spans)
    caches = [torch.randn(2, 2, 90, 64) for _ in range(2)]
    planes = [coding.encode(codec, x) for x in caches]
    q = torch.randn(2, 4, queries, 64)
    expected = reference.attend(q, *planes, keep, False, 0.125, codec, codec, (64, 64))
    hidden = (token < first) | (token >= stop)
    broken = [coding.encode(codec, torch.where(hidden[:, None], torch.nan, x)) for x in caches]
    options = (None, None, False, 0.125, "", None, codec.name, codec.name, 64, 64, torch.float32)
    torch.testing.assert_close(ops.attend(q, *broken, keep, rewrite.reach(keep), *options), expected)
    assert not hidden.any() or ops.attend(q, *broken, keep, None, *options).isnan().any()
