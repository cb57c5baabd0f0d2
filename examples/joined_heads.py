"""A model of real weights with heads twice as wide: KV heads joined in pairs, which changes nothing of what it says.

    python examples/joined_heads.py FOLDER [--model NAME]
    python -m tqcompile validate FOLDER --codecs balanced quality small tiny

Each KV head gets the channels of the next one beside its own, at the frequencies that each had before RoPE, and queries
are zero where the other's channels lie. SmolLM2-135M-Instruct (the default) has 64 dims, and 128 so. A rotation mixes
both heads, so that a codec's error on one is in part the other's: harder than a model that was trained so.
"""

import argparse

import torch
from smollm2 import load
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

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
    theta = config.rope_parameters["rope_theta"]
    had, given = (theta ** (-torch.arange(0, dims, 2).double() / dims) for dims in (width, 2 * width))
    factors = (given / had.repeat(2)).tolist()
    rope = {"rope_type": "longrope", "rope_theta": theta, "short_factor": factors, "long_factor": factors}
    rope |= {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": config.max_position_embeddings}
    changes = {"head_dim": 2 * width, "rope_parameters": rope, "dtype": "float32"}
    made = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **changes}))
    weights = {name: tensor.float().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if (part := name.rsplit(".", 2)[-2]) in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[name] = _PARTS[part](tensor, width, kv_heads)
    made.load_state_dict(weights)
    return made.eval()


def _beside(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Heads [heads, width, ...] with those of `second` beside them, each half of a rotation's pairs in its half."""
    halves = zip(first.chunk(2, 1), second.chunk(2, 1))
    return torch.cat([torch.cat(pair, 1) for pair in halves], 1)


def _queries(weight: torch.Tensor, width: int, kv_heads: int) -> torch.Tensor:
    heads = weight.unflatten(0, (-1, width))
    # Scores are divided by the root of twice the width.
    return _beside(heads * 2**0.5, torch.zeros_like(heads)).flatten(0, 1)


def _keys(weight: torch.Tensor, width: int, kv_heads: int) -> torch.Tensor:
    heads = weight.unflatten(0, (kv_heads, width))
    return _beside(heads, heads.roll(-1, 0)).flatten(0, 1)


def _out(weight: torch.Tensor, width: int, kv_heads: int) -> torch.Tensor:
    heads = weight.T.unflatten(0, (-1, width))
    return _beside(heads, torch.zeros_like(heads)).flatten(0, 1).T.contiguous()


_PARTS = {"q_proj": _queries, "k_proj": _keys, "v_proj": _keys, "o_proj": _out}


@torch.no_grad()
def largest_error(model: nn.Module, other: nn.Module, tokens: int = 300) -> float:
    """The largest difference of the logits of both models over the largest logit, for random tokens."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    expected, found = model(ids).logits, other(ids).logits
    return ((expected - found).abs().max() / expected.abs().max()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the model is written to")
    parser.add_argument("--model", metavar="NAME", help="default: SmolLM2-135M-Instruct")
    given = parser.parse_args(arguments)
    model, tokenizer = load(given.model)
    made = joined(model)
    error = largest_error(model, made)
    if not error <= TOLERANCE:
        raise SystemExit(f"the logits of the model with joined heads are off by {error:.1e}, so that it is none of use")
    for each in (made, tokenizer):
        each.save_pretrained(given.folder)
    print(f"{given.folder}: heads of {made.config.head_dim} dims; logits as before to {error:.0e}")


if __name__ == "__main__":
    main()
