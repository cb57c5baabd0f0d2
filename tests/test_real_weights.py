"""SmolLM2-135M-Instruct over compressed caches: what a codec costs on real weights, and what it saves.

A dense run chooses the tokens; each compressed run is led along the same ones, so that logits compare step by step.
"""

import pathlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from checkpoints import cache_of
from transformers import LogitsProcessor

import tqcompile
from tqcompile.formats import PRESETS

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

from smollm2 import bits_per_element, conversation, live_bytes, load, mean_kl, tensors, top1_agreement

CONTEXT, TOKENS = 280, 24
QUESTION = "In a few sentences: what does the text above say about the with statement?"
INNERS = pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])


class Led(LogitsProcessor):
    """Makes generate say the given tokens, whatever the logits are."""

    def __init__(self, tokens: torch.Tensor, start: int):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids, scores):
        led = torch.full_like(scores, -torch.inf)
        led[:, self.tokens[input_ids.shape[1] - self.start]] = 0
        return led


@dataclass
class Answer:
    """Tokens [N], the raw logits [N, vocabulary] behind them, and the cache."""

    tokens: torch.Tensor
    logits: torch.Tensor
    cache: object


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = load()
    return model, tokenizer, conversation(tokenizer, "compound", QUESTION, CONTEXT)


def answer(model, ids: torch.Tensor, led: torch.Tensor | None = None) -> Answer:
    """What generate says to `ids`, or along the tokens `led`."""
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS if led is None else len(led),
        do_sample=False,
        logits_processor=[] if led is None else [Led(led, ids.shape[1])],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Answer(result.sequences[0, ids.shape[1] :], torch.cat(result.logits), cache_of(result))


@pytest.fixture(scope="module")
def dense(smollm2) -> Answer:
    return answer(smollm2[0], smollm2[2])


@contextmanager
def compiled(model, **options):
    """The model with its forward compiled by the one line; as it was, afterwards."""
    model.forward = torch.compile(model.forward, backend="turboquant", options=options)
    try:
        yield
    finally:
        del model.forward


def assert_all_caches_are_compressed(model, cache, keys: str, values: str) -> None:
    """Each of them, in its own codec; and the bytes that the report counts are those of the live storages."""
    report = tqcompile.report(model)
    assert [tensor.codec.name for tensor in tensors(cache)] == [keys, values] * 30
    assert not report.refusals and not report.fallbacks, report
    assert not any(graph.events for graph in report.graphs), report
    assert report.compressed_bytes == live_bytes(cache)


def repeated(tokens: torch.Tensor) -> float:
    """The share of runs of three tokens that were there before."""
    runs = [tuple(run) for run in tokens.unfold(0, 3, 1).tolist()]
    return 1 - len(set(runs)) / len(runs)


@INNERS
def test_lossless_says_what_dense_says(smollm2, dense, inner):
    model, _, ids = smollm2
    with compiled(model, preset="lossless", inner=inner):
        ours = answer(model, ids)
    assert torch.equal(ours.tokens, dense.tokens)
    # Sums in another order; the logits are of the order of 20, after 30 layers.
    torch.testing.assert_close(ours.logits, dense.logits, atol=2e-4, rtol=0)
    assert_all_caches_are_compressed(model, ours.cache, "identity", "identity")


# What was measured of each pair, along the 24 tokens: mean KL, top-1 agreement, bits an element with spare room.
MEASURED = {
    ("turboquant:5", "turboquant:3"): (0.0344, 20 / 24, 4.371),
    ("turboquant:4", "turboquant:3"): (0.0638, 20 / 24, 3.857),
}


@INNERS
@pytest.mark.parametrize(("keys", "values"), MEASURED)
def test_a_codec_stays_close_and_small(smollm2, dense, keys, values, inner):
    model, _, ids = smollm2
    kl, top1, bits = MEASURED[keys, values]
    with compiled(model, keys=keys, values=values, inner=inner):
        ours = answer(model, ids, dense.tokens)
        assert_all_caches_are_compressed(model, ours.cache, keys, values)
        free = answer(model, ids) if (keys, values) == PRESETS["balanced"].pair else None
    assert torch.equal(ours.tokens, dense.tokens)
    assert mean_kl(dense.logits, ours.logits) < 1.5 * kl
    # One token more may fall the other way, on a machine that rounds otherwise.
    assert top1_agreement(dense.logits, ours.logits) > top1 - 1.5 / TOKENS
    assert bits_per_element(dense.cache) == 32
    assert bits_per_element(ours.cache) == pytest.approx(bits, abs=1e-3)
    if free is not None:
        # Left to itself it starts as dense does, and runs into no loop.
        assert repeated(free.tokens) < 0.2
        assert free.tokens[:8].tolist() == dense.tokens[:8].tolist()
