"""SmolLM2-135M-Instruct over compressed caches: what a codec costs on real weights, and what it saves.

A dense run chooses the tokens; each compressed run is led along the same ones, so that logits compare step by step.
"""

import pathlib
import sys
from dataclasses import dataclass

import pytest
import torch
from transformers import LogitsProcessor

import tqcompile
from tqcompile import CompressedKV

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

from smollm2 import bits_per_element, conversation, live_bytes, load, mean_kl, tensors, top1_agreement

CONTEXT, TOKENS = 280, 24
QUESTION = "In a few sentences: what does the text above say about the with statement?"


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
    cache = getattr(result, "cache", None) or result.past_key_values
    return Answer(result.sequences[0, ids.shape[1] :], torch.cat(result.logits), cache)


@pytest.fixture(scope="module")
def dense(smollm2) -> Answer:
    return answer(smollm2[0], smollm2[2])


def compressed(smollm2, led: torch.Tensor | None, **options) -> tuple[Answer, tqcompile.report]:
    """The answer of the model compiled by the one line, which is taken back afterwards, and the report."""
    model, _, ids = smollm2
    model.forward = torch.compile(model.forward, backend="turboquant", options=options)
    try:
        return answer(model, ids, led), tqcompile.report(model)
    finally:
        del model.forward


def assert_all_caches_are_compressed(result: Answer, report, keys: str, values: str) -> None:
    assert [cache.codec.name for cache in tensors(result.cache)] == [keys, values] * 30
    assert not report.refusals and not report.fallbacks, report
    assert not any(graph.events for graph in report.graphs), report
    assert report.compressed_bytes == live_bytes(result.cache)


def test_lossless_says_what_dense_says(smollm2, dense):
    ours, report = compressed(smollm2, None, preset="lossless", inner="eager")
    assert torch.equal(ours.tokens, dense.tokens)
    torch.testing.assert_close(ours.logits, dense.logits, atol=1e-3, rtol=1e-5)
    assert_all_caches_are_compressed(ours, report, "identity", "identity")


# Each codec: the mean KL and the top-1 agreement that were measured, and how far off they may be.
MEASURED = {
    ("turboquant:5", "turboquant:3"): (0.0, 1.0),
    ("turboquant:4", "turboquant:3"): (0.0, 1.0),
}


@pytest.mark.parametrize(("keys", "values"), MEASURED)
def test_a_codec_stays_close_and_is_small(smollm2, dense, keys, values):
    ours, report = compressed(smollm2, dense.tokens, keys=keys, values=values, inner="eager")
    print(
        keys,
        mean_kl(dense.logits, ours.logits),
        top1_agreement(dense.logits, ours.logits),
        live_bytes(ours.cache),
        bits_per_element(ours.cache),
        live_bytes(dense.cache),
        (dense.logits - ours.logits).abs().max(),
        smollm2[1].decode(ours.logits.argmax(-1)),
    )
