"""Presets on a model of real weights whose heads are twice as wide: KV heads joined in pairs, which changes nothing of
what it says.

    python examples/joined_heads.py [--model NAME] [--windows 4] [--context 1024] [--codecs balanced small ...]

Each KV head has the channels of the next one behind its own, at the frequencies that each had before RoPE, and serves
query heads of both, which are zero where the other's channels lie. SmolLM2-135M-Instruct (the default) has heads of 64
dims, and of 128 so. A codec's error on one head is in part the other's; a model that was trained so has no zeros.
"""

import argparse

import torch
from smollm2 import device, load, positive
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tqcompile.validate import Settings, terminal, validate

TOLERANCE = 1e-4


def joined(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the Llama family whose heads are twice as wide, in float32, with the weights of `model`.

    Raises:
        ValueError: its heads are odd, or its projections have biases.
    """
    config = model.config
    width, kv_heads = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
    if getattr(config, "attention_bias", False) or width % 2:
        raise ValueError(f"{type(model).__name__} has biases or heads of {width} dims; wanted none, and an even number")
    wide = type(config)(**{**config.to_dict(), "head_dim": 2 * width, "dtype": "float32"})
    made = AutoModelForCausalLM.from_config(wide)
    weights = {name: tensor.float().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if (part := name.rsplit(".", 2)[-2]) in _PARTS:
            weights[name] = _PARTS[part](tensor, width, kv_heads)
    made.load_state_dict(weights)
    had, rotary = model.model.rotary_emb.inv_freq, made.model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq = had.repeat(2)
    return made.eval().requires_grad_(False)


def _beside(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Heads [kv_heads, heads, width, ...] with those of `second` beside them: RoPE turns the two halves of a head."""
    halves = zip(first.chunk(2, 2), second.chunk(2, 2))
    return torch.cat([torch.cat(pair, 2) for pair in halves], 2)


def _shared(heads: torch.Tensor) -> torch.Tensor:
    """Query heads [kv_heads, heads, width, ...]: the first stay, others go to the KV head that theirs has joined."""
    stay = heads.shape[1] - heads.shape[1] // 2
    own, others = heads[:, :stay], heads.roll(-1, 0)[:, stay:]
    return torch.cat([_beside(own, 0 * own), _beside(0 * others, others)], 1).flatten(0, 2)


def _queries(weight: torch.Tensor, width: int, kv_heads: int) -> torch.Tensor:
    # Scores are divided by the root of twice the width.
    return _shared(weight.unflatten(0, (kv_heads, -1, width)) * 2**0.5)


def _keys(weight: torch.Tensor, width: int, kv_heads: int) -> torch.Tensor:
    heads = weight.unflatten(0, (kv_heads, 1, width))
    return _beside(heads, heads.roll(-1, 0)).flatten(0, 2)


def _out(weight: torch.Tensor, width: int, kv_heads: int) -> torch.Tensor:
    return _shared(weight.T.unflatten(0, (kv_heads, -1, width))).T.contiguous()


_PARTS = {"q_proj": _queries, "k_proj": _keys, "v_proj": _keys, "o_proj": _out}


@torch.no_grad()
def largest_error(model: nn.Module, other: nn.Module, tokens: int = 300) -> float:
    """The largest difference of the logits of both models over the largest logit, for random tokens."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    expected, found = model(ids).logits, other(ids).logits
    return ((expected - found).abs().max() / expected.abs().max()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--codecs", nargs="+", metavar="NAME", help="as `validate` has them (every preset)")
    for name, default in (("windows", 4), ("context", 1024), ("batch", 2)):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    model, tokenizer = load(given.model)
    made = joined(model)
    error = largest_error(model, made)
    if not error <= TOLERANCE:
        raise SystemExit(f"the logits of the model with joined heads are off by {error:.1e}: it is another model")
    print(f"heads of {made.config.head_dim} dims; logits as before to {error:.0e}\n")
    sizes = {"windows": given.windows, "context": given.context, "batch": given.batch}
    settings = Settings(**sizes, generate=0, inner="eager")
    print(terminal.text(validate(made.to(given.device), tokenizer, None, given.codecs, settings)))


if __name__ == "__main__":
    main()
