"""How long a whole decode step takes on a GPU with a dense cache and with a compressed one, in one run.

    python examples/bench_step.py [--layers 32] [--batch 8] [--context 32768] [--keys CODEC] [--values CODEC]

A decoder of the shape of Llama 3 8B with random weights in bfloat16, written as gpt-fast writes its own: caches are
buffers of one layer each, a step writes one token into them and attends over all. The dense one uses the best SDPA;
both are compiled with `mode="reduce-overhead"`, so that a step is the replay of a CUDA graph.
"""

import argparse
import gc
import statistics
import time

import torch
from smollm2 import add_codecs, positive
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import tqcompile

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 4096, 32, 8, 128, 14336, 128256
WARM = 4


class Layer(nn.Module):
    """Attention with a cache of its own, and the feed-forward network."""

    def __init__(self, batch: int, context: int):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-5) for _ in range(2))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(batch, KV_HEADS, context, HEAD_DIM))

    def forward(self, x: torch.Tensor, position: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        parts = self.qkv(self.norms[0](x)).view(batch, 1, -1, HEAD_DIM).transpose(1, 2)
        q, k, v = parts.split([HEADS, KV_HEADS, KV_HEADS], 1)
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

    def __init__(self, layers: int, batch: int, context: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(batch, context) for _ in tqdm(range(layers), desc="layers"))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("rates", 500000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        angle = position * self.rates
        turn = torch.stack([angle.cos(), angle.sin()]).to(self.head.weight.dtype)
        x = self.embedding(token)
        for layer in self.layers:
            x = layer(x, position, turn)
        return self.head(self.norm(x))


def step_ms(step, steps: int, batch: int, context: int, desc: str) -> tuple[float, float]:
    """Median time of a step at the end of the context, in milliseconds, and the seconds that compiling took."""
    times, token = [], torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    for i in tqdm(range(WARM + steps), desc=desc):
        position = torch.tensor([context - 1 - i % 8], device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(token, position)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[WARM:]), sum(times[:WARM])


def measure(name: str, options: argparse.Namespace, **compile_options) -> tuple:
    """A row of the table."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda"), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        model = Decoder(options.layers, options.batch, options.context)
        torch.set_default_dtype(torch.float32)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        compiled = torch.compile(model, mode="reduce-overhead", **compile_options)
        milliseconds, compiling = step_ms(compiled, options.steps, options.batch, options.context, name)
    held = torch.cuda.memory_allocated() - weights
    report = str(tqcompile.report(compiled)) if "backend" in compile_options else ""
    del model, compiled
    gc.collect()
    torch.cuda.empty_cache()
    return name, milliseconds, held / 2**30, compiling, report


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=positive, default=32, help="decoder layers (default 32)")
    parser.add_argument("--batch", type=positive, default=8, help="sequences (default 8)")
    parser.add_argument("--context", type=positive, default=32768, help="tokens of each (default 32768)")
    parser.add_argument("--steps", type=positive, default=20, help="timed steps (default 20)")
    add_codecs(parser)
    options = parser.parse_args()
    dense = measure("dense bfloat16", options)
    backend = tqcompile.turboquant(keys=options.keys, values=options.values)
    compressed = measure(f"{options.keys} / {options.values}", options, backend=backend)
    shape = f"{options.layers} layers, B{options.batch} x {options.context} tokens"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {shape}\n")
    rows = [(*row[:2], dense[1] / row[1], *row[2:4]) for row in (dense, compressed)]
    headers = ("cache", "step ms", "dense / this", "GiB beside weights", "compile s")
    print(tabulate(rows, headers, floatfmt=("", ".2f", ".2f", ".1f", ".0f")))
    print("\n" + "\n".join(compressed[4].splitlines()[:12]))


if __name__ == "__main__":
    main()
