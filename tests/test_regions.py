"""The first and last tokens of a cache as they are: against attention over decoded codes and exact rows, by hand."""

import pytest
import torch
from conversations import Conversation, conversations, fake_quantised
from models import EMBED, Shape, unchanged
from readers import READERS

import tqcompile
from tqcompile import formats

KINDS = ("tuples", "buffers", "counter", "made")
CODECS = ("turboquant:4", "turboquant:2")
CALLS = [5, 1, 1, 3, 4, 1, "again", 6, 1, "reset", 3, 1]


class Twin:
    """A dense model that attends over what a compressed one has: rows of codes, and exact ones of its regions."""

    def __init__(self, talk: Conversation, codecs, sinks: int, window: int):
        self.talk, self.codecs, self.sinks, self.window = talk, codecs, sinks, window
        talk.codecs, self.length = None, 0
        for block in talk.model.blocks:
            block.store, block.reader = unchanged, self._reader(block.reader)

    def _reader(self, reader):
        def read(q, k, v, mask):
            exact = torch.arange(k.shape[2]) < self.sinks
            exact |= torch.arange(k.shape[2]) >= self.length - self.window
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


@pytest.mark.parametrize("sinks, window", [(2, 3), (0, 4), (3, 0), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_reads_codes_and_the_exact_rows_of_its_regions(kind, sinks, window):
    shape = Shape()
    ours, twin = talks(kind, shape, sinks, window)
    assert steps(ours, twin, CALLS, shape, kind) < 5e-6
    for cache in ours.caches():
        assert {*range(min(4, sinks)), *range(max(0, 4 - window), 4)} <= kept(cache)
        assert cache.recent.numbers.dtype == shape.dtype and cache.recent.numbers.shape[2] == sinks + window + 1
    assert not tqcompile.report(ours.model).fallbacks


EVERY_CODEC = [("tuples", name) for name in formats.REGISTRY] + [(kind, "turboquant:2") for kind in KINDS[1:]]


@pytest.mark.parametrize("kind, codec", EVERY_CODEC)
def test_a_cache_that_fits_in_its_regions_is_as_good_as_dense(kind, codec):
    shape = Shape(layers=1)
    ours, dense = conversations(kind, shape, (codec, codec), sinks=4, window=20)
    dense = Twin(dense, ("identity",) * 2, 0, 0)
    x = torch.randn(2, 11, EMBED)
    for part in x.split((5, 1, 3, 1, 1), 1):
        torch.testing.assert_close(ours.feed(part), dense.feed(part), rtol=1e-5, atol=1e-5)
    assert all(kept(cache) >= set(range(11)) for cache in ours.caches())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["tuples", "counter"])
def test_every_spelling_of_attention_reads_them(kind, reader):
    shape = Shape(layers=1, reader=reader, head_dim=24)
    ours, twin = talks(kind, shape, 2, 3)
    assert steps(ours, twin, [4, 1, 4, 1], shape, kind) < 5e-6


@pytest.mark.parametrize("kind", ["tuples", "buffers"])
def test_inductor_gives_what_the_eager_inner_compiler_gives(kind):
    shape = Shape(layers=1)
    ours, twin = talks(kind, shape, 2, 3, inner="inductor")
    assert steps(ours, twin, [5, 1, 1, 4, 1], shape, kind) < 5e-5
