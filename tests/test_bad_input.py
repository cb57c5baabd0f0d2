"""Bad numbers, bad places and odd tensors in a compiled graph do what dense does."""

import pytest
import torch
from conversations import conversations
from models import EMBED, Shape
from representatives import REPRESENTATIVES
from test_mutations import LOSSLESS, SIZE, Layer, calls

import tqcompile
from tqcompile import formats

LOSSY = [name for name in REPRESENTATIVES if name != "identity"]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("kind", ["buffers", "counter"])
def test_an_index_past_the_end_is_the_error_that_dense_gives(kind, inner):
    ours, twin = conversations(kind, Shape(layers=1, length=4), ("q8_0", "q8_0"), inner=inner)
    for conversation in (ours, twin):
        conversation.feed(torch.randn(2, 3, EMBED))
        with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)|index"):
            conversation.feed(torch.randn(2, 3, EMBED))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", LOSSY)
def test_a_bad_number_in_one_token_stays_in_that_token(codec, number):
    clean, dirty = Layer(), Layer()
    options = {**dict(zip(("keys", "values"), formats.pair_of(codec))), "inner": "eager"}
    q, k, v, at = next(calls())
    with torch.no_grad():
        torch.compile(clean, backend="turboquant", options=options)(q, k, v, at)
        k = k.clone()
        k[0, 1, 1, 5] = number
        torch.compile(dirty, backend="turboquant", options=options)(q, k, v, at)
    ours, expected = dirty.k_cache.decode(), clean.k_cache.decode()
    assert not ours[0, 1, 1].isfinite().all()
    ours[0, 1, 1] = expected[0, 1, 1]
    assert torch.equal(ours, expected)
    for mine, theirs in zip(dirty.k_cache.planes, clean.k_cache.planes):
        rest = torch.ones(mine.shape[:-1], dtype=torch.bool)
        rest[0, 1, 1] = False
        assert torch.equal(mine[rest], theirs[rest])


@pytest.mark.parametrize("codec", REPRESENTATIVES)
def test_zero_vectors_stay_zero(codec):
    model, (keys, values) = Layer(), formats.pair_of(codec)
    compiled = torch.compile(model, backend="turboquant", options={"keys": keys, "values": values, "inner": "eager"})
    q, k, v, at = next(calls())
    with torch.no_grad():
        out = compiled(q, k * 0, v * 0, at)
    assert not model.k_cache.decode().any() and not out.any()


def test_inputs_that_are_not_contiguous():
    model, twin = Layer(), Layer()
    compiled = torch.compile(model, backend="turboquant", options=LOSSLESS)
    for q, k, v, at in calls(3):
        odd = [torch.randn(2, 2, 4, 64)[..., ::2].transpose(1, 2).copy_(x) for x in (q, k, v)]
        assert not any(x.is_contiguous() for x in odd)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*odd, at), twin(*odd, at))
    assert isinstance(model.k_cache, tqcompile.CompressedKV)


def test_a_cache_that_is_not_contiguous_is_compressed():
    model, twin = Layer(), Layer()
    model.k_cache = torch.zeros(2, 8, 4, 32).transpose(1, 2).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend="turboquant", options=LOSSLESS)
    for arguments in calls(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), twin(*arguments))
    assert isinstance(model.k_cache, tqcompile.CompressedKV)


@pytest.mark.parametrize("reason", ["view", "shared", "grad"])
def test_a_cache_that_cannot_be_taken_over_stays_dense_and_right(reason):
    model, twin = Layer(), Layer()
    base = torch.zeros(2, *SIZE)
    if reason == "view":
        model.k_cache = base[0]
    elif reason == "shared":
        holder = model.k_cache.view(-1)
        assert holder.numel()
    else:
        model.k_cache.requires_grad_(True)
    compiled = torch.compile(model, backend="turboquant", options=LOSSLESS)
    for arguments in calls(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), twin(*arguments))
    assert type(model.k_cache) is torch.Tensor
    assert tqcompile.report(model).refusals
