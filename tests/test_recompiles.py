"""How often a conversation compiles: a graph for each phase, one for any length, and never again.

AOTAutograd is there throughout: what it traces may ask for one length of what Dynamo left open.
"""

import pytest
import torch
from checkpoints import VOCABULARY, new_cache, tiny
from conversations import Conversation, conversations
from models import EMBED, MODELS, Shape
from torch._dynamo.utils import counters
from transformers import StaticCache

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
    ours, _ = conversations(kind, shape, CODECS, inner="aot_eager")
    feed(ours, WARM_UP)
    compiled = graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        feed(ours, [1] * 150 + [17, 900] + [1] * 200 + [1500] + [1] * 150)
        assert ours.filled > 2900
    assert graphs() == compiled


@KINDS
def test_a_second_conversation_of_another_length_compiles_nothing(kind):
    ours, _ = conversations(kind, Shape(layers=1, length=64), CODECS, inner="aot_eager")
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
def test_the_first_calls_compile_as_often_as_those_of_a_dense_model(kind):
    """A dense cache that comes back compressed asks for another graph, but so does a step after a prefill.

    For the int in `slices` Dynamo compiles one graph for its first value and one for any, with either cache.
    """
    counts = {}
    for backend in ("eager", "turboquant"):
        torch._dynamo.reset()
        ours, _ = conversations(kind, Shape(layers=1), CODECS, inner="aot_eager")
        if backend == "eager":
            ours.call = torch.compile(ours.model, backend="eager")
        before = graphs()
        feed(ours, WARM_UP)
        counts[backend] = graphs() - before
    # One for the prefill, one for a step, one for any number of tokens; and one more where a dense cache grows: of a
    # compressed one the length is left open from the prefill on.
    assert counts == {"eager": 3 + (kind == "tuples"), "turboquant": 3}


def _made_then_written(x, state, position):
    q = x.unflatten(-1, (2, 32)).transpose(1, 2)
    if state is None:
        keys, values = 3 * q, 2 * q
    else:
        keys, values = state
        keys.index_copy_(2, position, 3 * q), values.index_copy_(2, position, 2 * q)
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values), (keys, values)


@torch.no_grad()
def test_caches_of_other_lengths_are_written_where_they_lie():
    torch.compiler.reset()
    compiled = torch.compile(_made_then_written, backend=tqcompile.turboquant(preset="quality", inner="aot_eager"))
    for length in (5, 9, 7, 12):
        x = torch.randn(1, length, 64)
        _, state = compiled(x, None, None)
        shown, planes = [cache[:, :, :3] for cache in state], [cache.planes for cache in state]
        _, state = compiled(x[:, :1], state, torch.tensor([2]))
        assert all(cache.planes is held for cache, held in zip(state, planes))
        assert all(torch.equal(part, cache.decode()[:, :, :3]) for part, cache in zip(shown, state))
    assert not any(graph.events for graph in tqcompile.report().graphs)


def test_a_cache_that_grows_asks_for_any_length_where_sizes_are_static_otherwise():
    ours, _ = conversations("tuples", Shape(layers=1), CODECS)
    ours.call = torch.compile(
        ours.model, backend=tqcompile.turboquant(preset="small", inner="aot_eager"), dynamic=False
    )
    feed(ours, (5, 1, 1))
    with torch.compiler.set_stance("fail_on_recompile"):
        feed(ours, [1] * 20)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_llama_decodes_for_long_without_compiling(kind, padded):
    model = tiny("llama")
    call = torch.compile(
        model, backend="turboquant", options={"keys": "turboquant:4", "values": "turboquant:2", "inner": "aot_eager"}
    )
    cache = StaticCache(config=model.config, max_cache_len=128) if kind == "static" else new_cache(kind, model)

    seen = torch.zeros(2, 0, dtype=torch.int64)

    @torch.no_grad()
    def generate(calls):
        nonlocal seen
        for tokens in calls:
            seen = torch.cat([seen, torch.ones(2, tokens, dtype=torch.int64)], 1)
            seen[0, :2] = 0
            mask = {"attention_mask": seen} if padded else {}
            call(torch.randint(0, VOCABULARY, (2, tokens)), past_key_values=cache, use_cache=True, **mask)

    generate(WARM_UP)
    compiled = graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        generate([1] * 40 + [30] + [1] * 40)
    assert graphs() == compiled
    assert all(isinstance(layer.keys, tqcompile.CompressedKV) for layer in cache.layers)


@pytest.mark.parametrize("how", [{"dynamic": True}, {"dynamic": False}, {"mode": "reduce-overhead"}], ids=str)
@pytest.mark.parametrize("kind", ["tuples", "counter", "slices"])
def test_how_torch_compile_is_asked_does_not_change_the_numbers(kind, how):
    ours, twin = conversations(kind, Shape(layers=1), CODECS, inner="aot_eager")
    backend = tqcompile.turboquant(keys=CODECS[0], values=CODECS[1], inner="aot_eager")
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


def _scored_by_length(q, new, past):
    """Attention that looks at one length of its past, which is a number in that graph then, and at others not."""
    keys, values = past
    if keys.shape[2] == SPECIAL:
        q = 2 * q
    k, v = torch.cat([keys, new], 2), torch.cat([values, 3 * new], 2)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out * keys.shape[2] + k.size(-2), (k, v)


SPECIAL = 9


@pytest.mark.parametrize("lengths", [[1] * 9, [2, 2, 3, 2, 1], [4, 3, 4]], ids=str)
def test_the_length_that_a_graph_reads_of_a_past_is_without_the_tokens_that_it_appends(lengths):
    torch.compiler.reset()
    backend = tqcompile.turboquant(preset="lossless", inner="aot_eager")
    compiled = torch.compile(_scored_by_length, backend=backend, dynamic=True)
    q, tokens = torch.randn(2, 2, 3, 24, 16, generator=torch.Generator().manual_seed(0)).unbind()
    at = SPECIAL - sum(lengths[: len(lengths) // 2])
    dense = ours = (tokens[:, :, :at].clone(), tokens[:, :, :at].clone())
    seen = set()
    with torch.no_grad():
        for count in lengths:
            seen.add(at)
            new = slice(at, at + count)
            expected, dense = _scored_by_length(q[:, :, new], tokens[:, :, new], dense)
            found, ours = compiled(q[:, :, new], tokens[:, :, new], ours)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
            at += count
    assert SPECIAL in seen
    assert all(isinstance(cache, tqcompile.CompressedKV) for cache in ours)


@pytest.mark.parametrize("options", [{}, {"sinks": 2, "window": 4, "centre": True}], ids=str)
@KINDS
def test_a_graph_of_sizes_that_are_all_symbols_is_right(kind, options):
    torch.compiler.reset()
    shape = Shape(length=64)
    ours, eager = Conversation(MODELS[kind](shape)), Conversation(MODELS[kind](shape))
    eager.model.load_state_dict(ours.model.state_dict())
    backend = tqcompile.turboquant(preset="lossless", inner="aot_eager", **options)
    ours.call = torch.compile(ours.model.requires_grad_(False), backend=backend, dynamic=True)
    for tokens in (5, 1, 1, 3, 4, 1, 8):
        x = torch.randn(shape.batch, tokens, EMBED)
        assert torch.allclose(ours.feed(x), eager.feed(x), atol=2e-6)
    assert all(isinstance(cache, tqcompile.CompressedKV) for cache in ours.caches())
