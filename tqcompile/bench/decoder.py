"""The models whose whole steps are timed: a decoder written as gpt-fast writes its own, and any of Hugging Face's.

Weights are random, and caches are full of random tokens but for the places that steps write.
"""

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from tqcompile.bench.shapes import Shape

VOCABULARY = 128256
# The feed-forward network's width over the model's, as in Llama 3 8B.
EXPANSION = 3.5


class Layer(nn.Module):
    """Attention with a cache of its own, and the feed-forward network."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        hidden = int(EXPANSION * width)
        self.qkv = nn.Linear(width, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(shape.batch, shape.kv_heads, shape.context, shape.head_dim))

    def forward(self, x: torch.Tensor, position: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        batch, heads, kv_heads = x.shape[0], self.shape.heads, self.shape.kv_heads
        parts = self.qkv(self.norms[0](x)).view(batch, 1, -1, self.shape.head_dim).transpose(1, 2)
        q, k, v = parts.split([heads, kv_heads, kv_heads], 1)
        q, k = turned(q, turn), turned(k, turn)
        self.keys[:, :, position] = k
        self.values[:, :, position] = v
        read = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        x = x + self.out(read.transpose(1, 2).reshape(batch, 1, -1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """x rotated by position: pairs (i, i + half), with cosines and sines [2, half]."""
    first, second = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Decoder(nn.Module):
    """A stack of layers between an embedding and its head."""

    def __init__(self, shape: Shape, layers: int):
        super().__init__()
        width = shape.heads * shape.head_dim
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(shape) for _ in tqdm(range(layers), desc="layers", disable=None, leave=False))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("rates", 500000.0 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim))

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        angle = position * self.rates
        turn = torch.stack([angle.cos(), angle.sin()]).to(self.head.weight.dtype)
        x = self.embedding(token)
        for layer in self.layers:
            x = layer(x, position, turn)
        return self.head(self.norm(x))

    def caches(self) -> list[torch.Tensor]:
        """The key and value cache of every layer."""
        return [cache for layer in self.layers for cache in (layer.keys, layer.values)]


class Written:
    """Steps of a `Decoder`, each of which writes one of the last places of its caches."""

    name = "SDPA over buffers"

    def __init__(self, shape: Shape, layers: int, device: torch.device):
        self.model = Decoder(shape, layers)
        self.token = torch.zeros(shape.batch, 1, dtype=torch.long, device=device)
        last = range(shape.context - 1, max(-1, shape.context - 9), -1)
        self.positions = [torch.tensor([place], device=device) for place in last]

    def step(self, compiled, i: int) -> torch.Tensor:
        """Step `i`: its logits."""
        return compiled(self.token, self.positions[i % len(self.positions)])

    def caches(self) -> list[torch.Tensor]:
        """The key and value cache of every layer."""
        return self.model.caches()


class HuggingFace:
    """Steps of a model made from a configuration, over its static cache; `room` places of it are for them."""

    name = "Hugging Face's static cache"

    def __init__(self, name: str, shape: Shape, room: int, device: torch.device):
        from transformers import AutoModelForCausalLM, StaticCache

        config = text_config(name)
        self.model = AutoModelForCausalLM.from_config(
            config, dtype=torch.get_default_dtype(), attn_implementation="sdpa"
        )
        self.model.eval()
        self.token = torch.zeros(shape.batch, 1, dtype=torch.long, device=device)
        self.cache = StaticCache(config=config, max_cache_len=max(shape.context, room + 1))
        held = shape.batch, shape.kv_heads, max(1, shape.context - room), shape.head_dim
        for layer in range(config.num_hidden_layers):
            self.cache.update(torch.randn(held), torch.randn(held), layer)

    def step(self, compiled, i: int) -> torch.Tensor:
        """The next step: its logits."""
        return compiled(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits

    def caches(self) -> list[torch.Tensor]:
        """The key and value cache of every layer."""
        return [cache for layer in self.cache.layers for cache in (layer.keys, layer.values)]


def text_config(name: str):
    """The configuration of the language model in a folder or on the hub.

    Raises:
        ValueError: there is none, or transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError("--model reads a configuration with transformers: pip install transformers") from None
    try:
        return AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name} has no configuration to read: {str(error).splitlines()[0]}") from error


def shape_facts(name: str) -> dict[str, int]:
    """Heads, KV heads, head_dim and layers of a model, as its configuration has them.

    Raises:
        ValueError: the configuration does not name its heads, or the model keeps latents instead of keys and values.
    """
    config = text_config(name)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int) or getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"--model {name}: a {config.model_type} configuration does not say keys and values by heads; give --heads, "
            "--kv-heads and --head-dim instead of --model"
        )
    return {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or width // heads,
        "layers": config.num_hidden_layers,
    }


def parameter_count(model: str | None, shape: Shape, layers: int) -> int:
    """Parameters of the model whose step is timed, counted without making them."""
    with torch.device("meta"):
        if model is None:
            made = Decoder(shape, layers)
        else:
            from transformers import AutoModelForCausalLM

            made = AutoModelForCausalLM.from_config(text_config(model))
    return sum(parameter.numel() for parameter in made.parameters())
