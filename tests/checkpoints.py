"""Tiny random models of the transformers package, and how the tests run them and look at their caches."""

import pathlib

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from tqcompile import CompressedKV, report

VOCABULARY = 97
WINDOW = 8

_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    # The usual 0.02 makes logits so flat that a wrong cache hardly moves them.
    "initializer_range": 0.2,
    # A random model would end rows of a batch at chance steps.
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "qwen2, biases": (Qwen2ForCausalLM, Qwen2Config, _GROUPED),
    "gpt2, learned positions": (GPT2LMHeadModel, GPT2Config, _COMMON),
    "mistral, window": (MistralForCausalLM, MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    "gemma2, softcap and window": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW},
    ),
}


def tiny(name: str = "llama", attention: str = "sdpa") -> torch.nn.Module:
    """A random causal language model, the same at every call."""
    kind, config, sizes = _MODELS[name]
    torch.manual_seed(0)
    model = kind(config(**sizes, attn_implementation=attention)).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.normal_(std=0.2)
    return model


def prompt(rows: int, tokens: int, seed: int = 3) -> torch.Tensor:
    """Random token ids [rows, tokens], none of them special."""
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def new_cache(kind: str, model, room: int = 40):
    """An empty cache of the transformers package, growing or of fixed length."""
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=room)


@torch.no_grad()
def step(call, ids: torch.Tensor, cache, **inputs) -> torch.Tensor:
    """Logits of one call on a cache; the argument has had two names, and one place."""
    return call(ids, inputs.pop("attention_mask", None), inputs.pop("position_ids", None), cache, **inputs).logits


def cache_of(result):
    """The cache that `generate` returned with its tokens."""
    return getattr(result, "cache", None) or result.past_key_values


def tensors(cache) -> list[torch.Tensor]:
    """The key and value tensors of every layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_compressed(cache, model) -> None:
    """Every cache is compressed, none was refused, decoded for a reader, or run by the original graph."""
    found = report(model)
    assert all(isinstance(tensor, CompressedKV) for tensor in tensors(cache)), found
    assert found.graphs and not found.refusals and not found.fallbacks, found
    assert not any(graph.events for graph in found.graphs), found


def assert_same(ours: torch.Tensor, dense: torch.Tensor) -> None:
    """Equal up to the rounding of float32 sums, taken in another order."""
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


def save_characters(folder: pathlib.Path) -> pathlib.Path:
    """A tiny random model with a tokenizer of its own, a token a character, saved as `--model` takes it."""
    words = {word: index for index, word in enumerate(["<unk>", "<end>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant:"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", chat_template=template
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
