"""Every way to keep a cache, through every kind of call, against a dense cache or its fake-quantised twin."""

import pytest
import torch
from conversations import conversations, fake_quantised
from models import EMBED, MODELS, Shape
from readers import READERS
from representatives import OF_DENSE, every_pair

import tqcompile
from tqcompile import formats

CODECS = [*map(formats.pair_of, OF_DENSE)] + [("turboquant:5", "turboquant:3"), ("identity", "q8_0")]
CREATES = ("tuples", "made")


def talk(kind, shape, codecs, calls, eager_prefill=False, **options):
    """Largest difference to the twin over `calls`: numbers of tokens, and names of methods of the conversation."""
    ours, twin = conversations(kind, shape, codecs, **options)
    generator, worst = torch.Generator("cpu").manual_seed(1), 0.0
    device = torch.get_default_device()
    for at, call in enumerate(calls):
        if isinstance(call, str):
            getattr(ours, call)(), getattr(twin, call)()
            continue
        x = torch.randn(shape.batch, call, EMBED, generator=generator, device="cpu").to(device, shape.dtype)
        eager = eager_prefill and at == 0
        exact = eager or (kind in CREATES and ours.filled == 0)
        worst = max(worst, (ours.feed(x, eager=eager) - twin.feed(x, exact=exact)).abs().max().item())
    return worst, ours


def assert_compressed(conversation, codecs):
    caches, report = conversation.caches(), tqcompile.report(conversation.model)
    assert caches and all(isinstance(cache, tqcompile.CompressedKV) for cache in caches)
    assert [cache.codec.name for cache in caches[:2]] == list(codecs)
    assert {id(cache) for cache in caches} <= {id(cache) for cache in report.caches}
    assert not report.refusals and not report.fallbacks, report
    assert sum(graph.reads for graph in report.graphs) >= conversation.model.shape.layers


CALLS = [5, 1, 1, 3, 4, 1, "again", 6, 1, "reset", 3, 1]


@pytest.mark.parametrize("codecs", [("identity", "identity"), ("turboquant:4", "turboquant:2")], ids="/".join)
@pytest.mark.parametrize("kind", MODELS)
def test_a_conversation_equals_the_same_model_with_a_quantised_dense_cache(kind, codecs):
    worst, ours = talk(kind, Shape(), codecs, CALLS)
    assert worst < 5e-6
    assert_compressed(ours, codecs)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("codecs", CODECS, ids="/".join)
@pytest.mark.parametrize("kind", MODELS)
def test_every_codec_in_every_kind_of_cache(kind, codecs):
    # One layer: the tokens to store are the same to the last bit, so no code falls on the other side of an edge.
    worst, ours = talk(kind, Shape(layers=1), codecs, [4, 1])
    assert worst < 5e-6
    assert_compressed(ours, codecs)


@pytest.mark.parametrize("codecs", [("identity", "identity"), ("turboquant:4", "q8_0")], ids="/".join)
@pytest.mark.parametrize("kind", MODELS)
def test_a_dense_eager_prefill_is_compressed_by_the_first_compiled_step(kind, codecs):
    worst, ours = talk(kind, Shape(), codecs, [5, 1, 3, 1, 1, "reset", 2, 1], eager_prefill=True)
    assert worst < 5e-6
    assert_compressed(ours, codecs)


@pytest.mark.parametrize("kind", MODELS)
def test_inductor_gives_what_the_eager_inner_compiler_gives(kind):
    worst, ours = talk(kind, Shape(layers=1), ("turboquant:4", "q8_0"), [5, 1, 3, 1], inner="inductor")
    assert worst < 5e-5
    assert_compressed(ours, ("turboquant:4", "q8_0"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["tuples", "counter"])
def test_every_spelling_of_attention_reads_the_codes(kind, reader):
    worst, ours = talk(kind, Shape(layers=1, reader=reader), ("turboquant:4", "q8_0"), [4, 1, 2])
    assert worst < 5e-6
    assert_compressed(ours, ("turboquant:4", "q8_0"))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (6, 2), (8, 2), (6, 1), (7, 1), (8, 1), (12, 2), (14, 2)])
@pytest.mark.parametrize("reader", ["sdpa_gqa_scale", "eager_matmul"])
def test_every_ratio_of_heads_reads_its_own_keys(reader, heads, kv_heads):
    shape = Shape(layers=1, heads=heads, kv_heads=kv_heads, reader=reader)
    worst, ours = talk("buffers", shape, ("turboquant:4", "turboquant:3"), [4, 1])
    assert worst < 5e-6
    assert_compressed(ours, ("turboquant:4", "turboquant:3"))


@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize(
    "codecs", [("identity", "identity"), ("turboquant:5", "turboquant:3"), ("q8_0", "q8_0")], ids="/".join
)
def test_every_head_dim(head_dim, codecs):
    worst, ours = talk("buffers", Shape(layers=1, head_dim=head_dim), codecs, [4, 1])
    assert worst < 1e-5
    assert_compressed(ours, codecs)


ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize(
    "kind, reader, dtype", every_pair(("tuples", "counter"), ("sdpa_mask", "eager_at"), ROUNDING), ids=str
)
def test_half_precision_differs_by_its_own_rounding(kind, reader, dtype):
    shape = Shape(layers=1, reader=reader, dtype=dtype)
    worst, ours = talk(kind, shape, ("turboquant:4", "q8_0"), [4, 1, 2])
    assert worst < ROUNDING[dtype]
    assert_compressed(ours, ("turboquant:4", "q8_0"))


def test_a_cache_holds_what_the_reference_encodes():
    ours, twin = conversations("buffers", Shape(layers=1), ("turboquant:4", "q8_0"))
    x = torch.randn(2, 6, EMBED)
    ours.feed(x), twin.feed(x)
    for cache, dense in zip(ours.caches(), twin.caches()):
        torch.testing.assert_close(cache.decode(), dense)
    assert not torch.equal(twin.caches()[0][:, :, :6], fake_quantised(torch.zeros(2, 2, 6, 32), "q8_0"))
