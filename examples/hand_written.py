"""A transformer that knows nothing of tqcompile, with a cache of its own. One line of `main` makes that cache small.

    python examples/hand_written.py [--tokens 200] [--keys CODEC] [--values CODEC]

Its weights are random: what it says means nothing, and what its cache takes is real.
"""

import argparse

import torch
from smollm2 import add_codecs, backend_options, positive
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import tqcompile
from tqcompile.options import INNERS


class Attention(nn.Module):
    """Causal attention over a cache of fixed length that is written in place."""

    def __init__(self, width: int, heads: int, length: int):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, heads, length, self.head_dim), persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [1, T, width] at `positions` [T] -> [1, T, width]."""
        q, k, v = (part.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        y = scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Tokens in, logits of the next token out."""

    def __init__(self, vocabulary: int = 256, width: int = 256, heads: int = 4, layers: int = 2, length: int = 512):
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.attention = nn.ModuleList(Attention(width, heads, length) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """tokens [1, T] at `positions` [T] -> logits [1, T, vocabulary]."""
        x = self.embed(tokens) + self.places(positions)
        mask = torch.arange(self.length) <= positions[:, None]
        for attention, mlp in zip(self.attention, self.mlp):
            x = x + attention(x, positions, mask)
            x = x + mlp(x)
        return self.head(x)


@torch.no_grad()
def generate(model, prompt: torch.Tensor, count: int) -> list[int]:
    """Greedy continuation of `prompt` [1, T]."""
    positions = torch.arange(prompt.shape[1])
    token, said = model(prompt, positions)[:, -1:].argmax(-1), []
    for position in range(prompt.shape[1], prompt.shape[1] + count):
        said.append(int(token))
        token = model(token, torch.tensor([position]))[:, -1:].argmax(-1)
    return said


def main(argv: list[str] | None = None) -> None:
    """Generate with the compressed cache and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=positive, default=200, help="tokens to generate (default 200)")
    parser.add_argument("--inner", choices=INNERS, default="inductor", help="compiler of the rewritten graph")
    add_codecs(parser)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    prompt = torch.randint(0, 256, (1, 48))
    model = Transformer(length=48 + options.tokens).eval()

    model = torch.compile(model, backend="turboquant", options=backend_options(options))

    said = generate(model, prompt, options.tokens)
    print(f"{len(said)} tokens: {said[:8]} ...")
    print(f"the key cache of layer 0 is now a {model.attention[0].k_cache!r}\n")
    print(tqcompile.report(model))


if __name__ == "__main__":
    main()
