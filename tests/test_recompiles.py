"""How often a conversation compiles: a graph for each phase, one for any length, and never again."""

import pytest
import torch
from checkpoints import VOCABULARY, new_cache, tiny
from models import EMBED, MODELS, Conversation, Shape, conversations
from torch._dynamo.utils import counters

import tqcompile

CODECS = ("turboquant:4", "q8_0")
KINDS = pytest.mark.parametrize("kind", MODELS)

# Calls of each form that come later: a first prefill, single tokens, then two lengths of several tokens, by which
# Dynamo learns that their number varies.
WARM_UP = (5, 1, 1, 1, 3, 4, 1)
LONG = 3200


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def feed(conversation: Conversation, calls) -> None:
    shape = conversation.model.shape
    for tokens in calls:
        conversation.feed(torch.randn(shape.batch, tokens, EMBED))


@KINDS
def test_five_hundred_steps_and_thousands_of_tokens_compile_nothing(kind):
    shape = Shape(batch=1, heads=2, kv_heads=1, layers=1, length=LONG)
    ours, _ = conversations(kind, shape, CODECS)
    feed(ours, WARM_UP)
    compiled = graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        feed(ours, [1] * 150 + [17, 900] + [1] * 200 + [1500] + [1] * 150)
        assert ours.filled > 2900
    assert graphs() == compiled


@KINDS
def test_a_second_conversation_of_another_length_compiles_nothing(kind):
    ours, _ = conversations(kind, Shape(layers=1, length=64), CODECS)
    feed(ours, WARM_UP)
    ours.again()
    feed(ours, (6, 1))
    compiled = graphs()
    for prefill in (2, 9, 30):
        ours.again()
        with torch.compiler.set_stance("fail_on_recompile"):
            feed(ours, (prefill, 1, 1, 3))
    assert graphs() == compiled


@KINDS
def test_the_first_calls_compile_no_more_than_a_dense_model_and_once_for_the_cache_that_changed(kind):
    """A dense cache comes in once; as of the next call it is a compressed one, which is another graph.

    For a start that is an int (`slices`) Dynamo compiles one graph for 0, one for any, with either cache.
    """
    counts = {}
    for backend in ("eager", "turboquant"):
        torch._dynamo.reset()
        ours, _ = conversations(kind, Shape(layers=1), CODECS)
        if backend == "eager":
            ours.call = torch.compile(ours.model, backend="eager")
        before = graphs()
        feed(ours, WARM_UP)
        counts[backend] = graphs() - before
    assert counts["turboquant"] <= counts["eager"] + 1, counts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_llama_decodes_for_long_without_compiling(kind, attention):
    model = tiny("llama", attention)
    call = torch.compile(model, backend="turboquant", options={"preset": "small", "inner": "eager"})
    cache = new_cache(kind, model) if kind == "dynamic" else long_static_cache(model)

    @torch.no_grad()
    def generate(calls):
        for tokens in calls:
            call(torch.randint(0, VOCABULARY, (1, tokens)), past_key_values=cache, use_cache=True)

    generate(WARM_UP)
    compiled = graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        generate([1] * 40 + [30] + [1] * 40)
    assert graphs() == compiled
    assert all(isinstance(layer.keys, tqcompile.CompressedKV) for layer in cache.layers)


def long_static_cache(model):
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=128)


@pytest.mark.parametrize("how", [{"dynamic": True}, {"dynamic": False}, {"mode": "reduce-overhead"}], ids=str)
@pytest.mark.parametrize("kind", ["tuples", "counter", "slices"])
def test_how_torch_compile_is_asked_does_not_change_the_numbers(kind, how):
    ours, twin = conversations(kind, Shape(layers=1), CODECS)
    backend = tqcompile.turboquant(keys=CODECS[0], values=CODECS[1], inner="eager")
    ours.call = torch.compile(ours.model, backend=backend, **how)
    for at, tokens in enumerate((4, 1, 1, 2, 1)):
        x = torch.randn(2, tokens, EMBED)
        torch.testing.assert_close(ours.feed(x), twin.feed(x, exact=kind == "tuples" and at == 0), atol=5e-6, rtol=0)
    assert all(isinstance(cache, tqcompile.CompressedKV) for cache in ours.caches())


def test_reduce_overhead_reaches_inductor_and_runs_on_a_cpu():
    ours, twin = conversations("counter", Shape(layers=1), CODECS)
    backend = tqcompile.turboquant(keys=CODECS[0], values=CODECS[1])
    ours.call = torch.compile(ours.model, backend=backend, mode="reduce-overhead")
    for tokens in (3, 1, 1):
        x = torch.randn(2, tokens, EMBED)
        torch.testing.assert_close(ours.feed(x), twin.feed(x), atol=5e-5, rtol=0)
