"""A tiny Llama of the transformers package, with its own dynamic and static caches."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import tqcompile

VOCABULARY = 97


def llama(attention: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def new_cache(kind: str, model):
    return (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    )


@torch.no_grad()
def logits(call, cache, calls) -> list[torch.Tensor]:
    """Logits of each of several calls on one cache."""
    generator = torch.Generator().manual_seed(3)
    steps = (torch.randint(0, VOCABULARY, (2, tokens), generator=generator) for tokens in calls)
    return [call(ids, past_key_values=cache, use_cache=True).logits for ids in steps]


def tensors(cache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_identity_equals_the_eager_model(kind, attention):
    model = llama(attention)
    compiled = torch.compile(model, backend="turboquant", options={"preset": "lossless", "inner": "eager"})
    cache, calls = new_cache(kind, model), [6, 1, 1, 3, 1]
    expected = logits(model, new_cache(kind, model), calls)
    for ours, dense in zip(logits(compiled, cache, calls), expected):
        torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    report = tqcompile.report(model)
    assert all(isinstance(tensor, tqcompile.CompressedKV) for tensor in tensors(cache)), report
    assert not report.refusals and not report.fallbacks, report


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_codec_comes_close_and_a_second_cache_starts_clean(kind):
    model = llama("sdpa")
    compiled = torch.compile(model, backend="turboquant", options={"preset": "quality", "inner": "eager"})
    calls = [6, 1, 2]
    expected = logits(model, new_cache(kind, model), calls)
    for _ in range(2):
        for ours, dense in zip(logits(compiled, new_cache(kind, model), calls), expected):
            assert (ours - dense).norm() < 0.02 * dense.norm()
