"""The first and last tokens of a cache as they are: against attention over decoded codes and exact rows, by hand."""

import pytest
import torch
from checkpoints import assert_compressed, assert_same, new_cache, prompt, step, tensors, tiny
from conversations import Conversation, conversations, fake_quantised
from models import EMBED, Shape, unchanged
from readers import READERS
from representatives import OF_DENSE

import tqcompile
from tqcompile import coding, formats, recent, reference

KINDS = ("tuples", "buffers", "counter", "made")
CODECS = ("turboquant:4", "turboquant:2")
CALLS = [5, 1, 1, 3, 4, 1, "again", 6, 1, "reset", 3, 1]


class Twin:
    """A dense model that attends over what a compressed one has: rows of codes, and exact ones of its regions."""

    def __init__(self, talk: Conversation, codecs, sinks: int, window: int):
        self.talk, self.codecs, self.sinks, self.window = talk, codecs, sinks, window
        talk.codecs, self.length, self.rows = None, 0, None
        for block in talk.model.blocks:
            block.store, block.reader = unchanged, self._reader(block.reader)

    def _reader(self, reader):
        def read(q, k, v, mask):
            place = torch.arange(k.shape[2])
            exact = (place < self.sinks) | (place >= self.length - self.window)
            if self.rows is not None:
                exact = torch.isin(place, torch.tensor(sorted(self.rows)))
            sides = zip((k, v), self.codecs)
            rows = [torch.where(exact[:, None], x, fake_quantised(x, codec)) for x, codec in sides]
            return reader(q, *((k, v) if self.exact else rows), mask)

        return read

    def feed(self, x, exact=False):
        self.length, self.exact = self.talk.filled + x.shape[1], exact
        return self.talk.feed(x)


def talks(kind, shape, sinks, window, codecs=CODECS, **options):
    ours, twin = conversations(kind, shape, codecs, sinks=sinks, window=window, **options)
    return ours, Twin(twin, codecs, sinks, window)


def steps(ours, twin, calls, shape, kind):
    """The largest difference over `calls`, as in other tests of conversations."""
    generator, worst = torch.Generator().manual_seed(1), 0.0
    for call in calls:
        if isinstance(call, str):
            getattr(ours, call)(), getattr(twin.talk, call)()
            continue
        x = torch.randn(shape.batch, call, EMBED, generator=generator).to(shape.dtype)
        exact = kind in ("tuples", "made") and ours.filled == 0
        worst = max(worst, (ours.feed(x) - twin.feed(x, exact)).abs().max().item())
    return worst


def kept(cache) -> set[int]:
    return {place for place in cache.recent.index.tolist() if place >= 0}


TWO = [(kind, 2, 3) for kind in KINDS] + [("tuples", 0, 4), ("counter", 0, 4), ("tuples", 3, 0), ("counter", 3, 0)]


@pytest.mark.parametrize("kind, sinks, window", TWO)
def test_attention_reads_codes_and_the_exact_rows_of_its_regions(kind, sinks, window):
    shape = Shape()
    ours, twin = talks(kind, shape, sinks, window)
    assert steps(ours, twin, CALLS, shape, kind) < 5e-6
    for cache in ours.caches():
        assert {*range(min(4, sinks)), *range(max(0, 4 - window), 4)} <= kept(cache)
        assert cache.recent.numbers.dtype == shape.dtype and cache.recent.numbers.shape[2] == sinks + window + 1
    assert not tqcompile.report(ours.model).fallbacks


EVERY_CODEC = [("tuples", name) for name in OF_DENSE if formats.codec(name).for_values] + [
    (kind, "turboquant:2") for kind in KINDS[1:]
]


@pytest.mark.parametrize("kind, codec", EVERY_CODEC)
def test_a_cache_that_fits_in_its_regions_is_as_good_as_dense(kind, codec):
    shape = Shape(layers=1)
    ours, dense = conversations(kind, shape, (codec, codec), sinks=4, window=20)
    dense = Twin(dense, ("identity",) * 2, 0, 0)
    x = torch.randn(2, 11, EMBED)
    # What a codec can change shows in a prompt and a step; which calls there are changes the graph, and not the codec.
    for part in x.split((5, 1, 3, 1, 1) if codec == "turboquant:2" else (10, 1), 1):
        torch.testing.assert_close(ours.feed(part), dense.feed(part), rtol=1e-5, atol=1e-5)
    assert all(kept(cache) >= set(range(11)) for cache in ours.caches())


# Each spelling in each of the two kinds of cache is in test_cache_shapes.py: here they take turns.
SPELLINGS = [(("tuples", "counter")[place % 2], reader) for place, reader in enumerate(READERS)]


@pytest.mark.parametrize("kind, reader", SPELLINGS)
def test_every_spelling_of_attention_reads_them(kind, reader):
    shape = Shape(layers=1, reader=reader, head_dim=24)
    ours, twin = talks(kind, shape, 2, 3)
    assert steps(ours, twin, [4, 1, 4, 1], shape, kind) < 5e-6


@pytest.mark.parametrize("kind", ["tuples", "buffers"])
def test_inductor_gives_what_the_eager_inner_compiler_gives(kind):
    shape = Shape(layers=1)
    ours, twin = talks(kind, shape, 2, 3, inner="inductor")
    assert steps(ours, twin, [5, 1, 1, 4, 1], shape, kind) < 5e-5


def grown(tokens=9, sinks=2, window=3, batch=2, calls=None):
    """A tuple of layers' caches of so many tokens, the conversation, and its twin."""
    shape = Shape(layers=1, batch=batch)
    ours, twin = talks("tuples", shape, sinks, window)
    steps(ours, twin, calls or [tokens - 2, 1, 1], shape, "tuples")
    return ours, twin


def after(ours, twin, change, tokens=1):
    """The largest difference of one more step, after `change` of both caches."""
    ours.state = tuple((change(k), change(v)) for k, v in ours.state)
    twin.talk.state = tuple((change(k), change(v)) for k, v in twin.talk.state)
    ours.filled = twin.talk.filled = ours.state[0][0].shape[2]
    x = torch.randn(ours.state[0][0].shape[0], tokens, EMBED)
    return (ours.feed(x) - twin.feed(x)).abs().max().item()


def test_a_reorder_of_sequences_takes_their_exact_tokens_along():
    order = torch.tensor([1, 0, 1])
    assert after(*grown(), lambda x: x.index_select(0, order)) < 5e-6


def test_a_copy_has_its_own():
    ours, twin = grown()
    before = ours.state
    assert after(ours, twin, torch.clone) < 5e-6
    assert ours.state[0][0].recent.numbers.data_ptr() != before[0][0].recent.numbers.data_ptr()


def test_a_cache_that_was_cut_never_reads_what_came_later():
    """Of the last tokens of what is left those are exact that later ones did not push out."""
    ours, twin = grown(tokens=9, sinks=2, window=3)
    twin.rows = {0, 1, 6, 7}
    assert after(ours, twin, lambda x: x[:, :, :7]) < 5e-6
    assert kept(ours.state[0][0]) == twin.rows


def test_two_continuations_of_one_prefix_do_not_see_each_other():
    ours, twin = grown(tokens=6, sinks=1, window=3)
    prefix, same = ours.state, twin.talk.state
    assert after(ours, twin, lambda x: x) < 5e-6
    first, ours.state, twin.talk.state = (ours.state, twin.talk.state), prefix, same
    assert after(ours, twin, lambda x: x) < 5e-6
    assert kept(first[0][0][0]) == kept(ours.state[0][0]) == {0, 4, 5, 6}
    ours.state, twin.talk.state = first
    assert after(ours, twin, lambda x: x) < 5e-6


@pytest.mark.parametrize("change", ["zero", "copy", "view", "column", "fill", "scatter"])
def test_what_eager_code_writes_is_what_attention_reads(change):
    """No slot holds a token that was overwritten behind its back, in a static cache, also through a view of it."""
    shape = Shape(layers=1)
    ours, twin = talks("buffers", shape, 2, 3)
    steps(ours, twin, [6, 1], shape, "buffers")
    new = torch.randn(2, 2, 24, 32)
    for model in (ours.model, twin.talk.model):
        for cache in (model.blocks[0].k_cache, model.blocks[0].v_cache):
            match change:
                case "zero":
                    cache.zero_()
                case "copy":
                    cache.copy_(new)
                case "view":
                    cache[:, :, :5].copy_(new[:, :, :5])
                case "column":
                    cache[:, 1:][:, :, 1].copy_(new[:, 1:, 1])
                case "fill":
                    cache[1:].fill_(0.5)
                case "scatter":
                    cache.scatter_(2, torch.arange(24).view(-1, 1).expand(2, 2, 24, 32), new)
    twin.rows = {7}
    x = torch.randn(2, 1, EMBED)
    assert (ours.feed(x) - twin.feed(x)).abs().max().item() < 5e-6
    assert kept(ours.caches()[0]) == {7}


def test_an_eager_prefill_of_a_growing_cache_is_kept_from_its_first_step_on():
    shape = Shape(layers=1)
    ours, twin = talks("tuples", shape, 2, 3)
    x = torch.randn(2, 8, EMBED)
    ours.feed(x[:, :7], eager=True), twin.feed(x[:, :7])
    assert (ours.feed(x[:, 7:]) - twin.feed(x[:, 7:])).abs().max().item() < 5e-6
    assert kept(ours.state[0][0]) == {0, 1, 5, 6, 7}


def test_a_graph_that_keeps_none_makes_those_of_another_void():
    """One cache, written by graphs of other options in turn: none reads what the other does not know of."""
    shape = Shape(layers=1)
    ours, twin = talks("buffers", shape, 2, 3)
    steps(ours, twin, [6], shape, "buffers")
    kept_by, options = ours.call, {"keys": CODECS[0], "values": CODECS[1], "inner": "eager"}
    ours.call, twin.rows = torch.compile(ours.model, backend="turboquant", options=options), set()
    for call, window in ((ours.call, set()), (kept_by, {8}), (ours.call, set()), (kept_by, {10}), (kept_by, {10, 11})):
        ours.call, twin.rows = call, window
        assert steps(ours, twin, [2] if not window and ours.filled == 6 else [1], shape, "buffers") < 5e-6


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "causal"])
def test_many_keys_are_read_block_by_block(monkeypatch, mask):
    """A running softmax gives what one over all scores does."""
    codec = formats.codec("q8_0")
    q, k, v = torch.randn(2, 6, 4, 32), torch.randn(2, 3, 150, 32), torch.randn(2, 3, 150, 32)
    keep = torch.rand(2, 1, 4, 150) < 0.7
    masks = {"bool": keep, "additive": torch.where(keep, torch.randn(keep.shape), -torch.inf)}
    sides = [tensor for x in (k, v) for tensor in recent.first_and_last(x, 2, 2, 70)]
    exact = recent.exact(sides, q, 0, 150)
    planes = [coding.encode(codec, x) for x in (k, v)]
    how = masks.get(mask), mask == "causal", 0.2, codec, codec, (32, 32), "", torch.randn(2, 6, 4, 1), exact
    whole = reference.attend_beside(q, *planes, *how)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 64)
    blocks = reference.attend_beside(q, *planes, *how)
    for one, other in zip(blocks, whole):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_bytes_and_the_report_count_them():
    shape = Shape(layers=1)
    ours, twin = talks("buffers", shape, 2, 3)
    steps(ours, twin, [6], shape, "buffers")
    bare, other = conversations("buffers", shape, CODECS)
    bare.feed(torch.randn(2, 6, EMBED)), other.feed(torch.randn(2, 6, EMBED))
    each = 2 * 2 * 6 * 32 * 4 + 6 * 8
    assert [a.nbytes - b.nbytes for a, b in zip(ours.caches(), bare.caches())] == [each, each]
    report, without = tqcompile.report(ours.model), tqcompile.report(bare.model)
    assert report.compressed_bytes == without.compressed_bytes + 2 * each
    assert "first 2 and last 3 tokens" in str(report) and "first" not in str(without)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_model_of_transformers_whose_cache_fits_is_as_good_as_dense(kind):
    model = tiny()
    options = {"keys": "turboquant:2", "values": "turboquant:2", "inner": "eager", "sinks": 4, "window": 36}
    compiled = torch.compile(model, backend="turboquant", options=options)
    ours, dense = new_cache(kind, model), new_cache(kind, model)
    for index, tokens in enumerate((6, 1, 1, 3, 1)):
        ids = prompt(2, tokens, 50 + index)
        assert_same(step(compiled, ids, ours), step(model, ids, dense))
    if kind == "static":
        ours.reset(), dense.reset()
        ids = prompt(2, 5, 60)
        assert_same(step(compiled, ids, ours), step(model, ids, dense))
    else:
        for cache in (ours, dense):
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([1, 0]))
    assert_compressed(ours, model)
    assert_same(step(compiled, prompt(2, 1), ours), step(model, prompt(2, 1), dense))
    for cache in tensors(ours):
        assert kept(cache) == set(range(6 if kind == "static" else 10))


def test_a_graph_that_writes_into_a_view_is_seen_by_all_that_keep_its_tokens():
    """The view is of one sequence of two. Codes are exact here: only a slot that is out of date could differ."""

    def step(k_cache, v_cache, q, k, v, at):
        k_cache[:, :, at], v_cache[:, :, at] = k, v
        return torch.nn.functional.scaled_dot_product_attention(q, k_cache, v_cache)

    options = {"preset": "lossless", "inner": "eager", "sinks": 2, "window": 3}
    compiled = torch.compile(step, backend="turboquant", options=options, dynamic=False)
    ours, dense = ([torch.zeros(2, 2, 8, 16) for _ in range(2)] for _ in range(2))
    with torch.no_grad():
        for at, rows in (([0, 1, 2], 0), ([1], 1), ([3], 0), ([2, 3], 1), ([3], 0), ([4], 1), ([4], 1), ([5], 0)):
            q, k, v = (torch.randn(2 - rows, 2, len(at), 16) for _ in range(3))
            call = q, k, v, torch.tensor(at)
            mine = compiled(*(cache[rows:] if rows else cache for cache in ours), *call)
            torch.testing.assert_close(mine, step(*(cache[rows:] for cache in dense), *call))
    assert isinstance(ours[0], tqcompile.CompressedKV) and kept(ours[0])
