"""However attention is spelled, a compressed cache gives what the model gives over tokens that were quantised."""

import copy

import pytest
import torch
from conversations import fake_quantised
from spellings import HEAD_DIM, HEADS, SPELLINGS
from torch import nn

import tqcompile

EMBED, LENGTH = 32, 24
CODECS = {"keys": "turboquant:3", "values": "q8_0"}


class Attention(nn.Module):
    """Buffers that are written in place and read up to the last token."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling, self.codecs = spelling, (None, None)
        self.q, self.k, self.v = (nn.Linear(EMBED, n * HEAD_DIM) for n in (HEADS, spelling.heads, spelling.heads))
        self.out = nn.Linear(HEADS * HEAD_DIM, EMBED)
        for weight in (self.q.weight, self.k.weight, self.v.weight):
            nn.init.normal_(weight, std=1.5 * EMBED**-0.5)
        empty = spelling.kept(torch.zeros(2, spelling.heads, LENGTH, HEAD_DIM))
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, empty.clone(memory_format=torch.contiguous_format))

    def forward(self, x, start: int):
        q, k, v = (w(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for w in (self.q, self.k, self.v))
        dim, caches = self.spelling.dim, (self.k_cache, self.v_cache)
        for cache, tokens, codec in zip(caches, (k, v), self.codecs):
            tokens = self.spelling.kept(tokens)
            tokens = tokens if codec is None else fake_quantised(tokens, codec)
            cache.narrow(dim, start, x.shape[1]).copy_(tokens)
        k, v = (cache.narrow(dim, 0, start + x.shape[1]) for cache in caches)
        return self.out(self.spelling.attend(q, k, v).transpose(1, 2).flatten(2))


def codec_of(cache):
    return cache.codec.name if isinstance(cache, tqcompile.CompressedKV) else None


@torch.no_grad()
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_reads_what_was_stored(name):
    model = Attention(SPELLINGS[name]).requires_grad_(False)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="turboquant", options={**CODECS, "inner": "eager"})
    start = 0
    for tokens in (7, 1, 1, 3):
        x = torch.randn(2, tokens, EMBED)
        ours = compiled(x, start)
        # Some stay dense, which the report has to say: the twin quantises what the model does.
        twin.codecs = codec_of(model.k_cache), codec_of(model.v_cache)
        torch.testing.assert_close(ours, twin(x, start), rtol=1e-5, atol=1e-5)
        start += tokens
    assert twin.codecs[0] in (None, CODECS["keys"]) and twin.codecs[1] in (None, CODECS["values"])
    report = tqcompile.report(model)
    assert bool(report.refusals) == (None in twin.codecs), report
    assert report.refusals or report.fallbacks or any(graph.reads for graph in report.graphs)
