"""How long one decode step takes with a dense cache and with a compressed one, both compiled, in one run.

    python examples/bench_cpu.py [--context 4096] [--steps 30] [--keys CODEC] [--values CODEC]

The dense model is compiled by Inductor twice, with Hugging Face's growing and its static cache; the compressed step
is judged against the faster. Steps of all three alternate, so that what else the machine does meets them alike.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from smollm2 import (
    WARM_UP,
    add_codecs,
    backend_options,
    english,
    kept_as,
    live_bytes,
    load,
    mark_growing,
    positive,
    prefill,
)
from tabulate import tabulate
from tqdm import tqdm
from transformers import StaticCache

import tqcompile

BAR = 1.3
WARM = WARM_UP + 2


@dataclass
class Contender:
    """A compiled model with a cache of its own, and the seconds each of its steps took."""

    name: str
    step: Callable
    cache: object
    compiling: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def run(self, token: torch.Tensor) -> float:
        """One step, in seconds."""
        start = time.perf_counter()
        self.step(token, None, None, self.cache)
        return time.perf_counter() - start

    def warm_up(self, token: torch.Tensor) -> None:
        """The steps that compile, and two more."""
        self.compiling = sum(self.run(token) for _ in range(WARM))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name (default: packaged SmolLM2)")
    parser.add_argument("--context", type=positive, default=4096, help="tokens in the cache (default 4096)")
    parser.add_argument("--steps", type=positive, default=30, help="timed steps of each (default 30)")
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor", help="compiler of all three")
    add_codecs(parser)
    return parser.parse_args(argv)


def contenders(model, ids: torch.Tensor, options: argparse.Namespace) -> tuple[list[Contender], torch.Tensor]:
    """Three models whose caches hold the same tokens, and the token that comes next."""
    cache, token = prefill(model, ids, desc="prefill, growing")
    room = ids.shape[1] + options.steps + WARM
    static, _ = prefill(model, ids, StaticCache(config=model.config, max_cache_len=room), desc="prefill, static")
    growing = torch.compile(model, backend=options.inner)
    fixed = torch.compile(model, backend=options.inner)
    compressed = torch.compile(model, backend="turboquant", options=backend_options(options))
    return [
        Contender("dense, growing cache", growing, mark_growing(copy.deepcopy(cache))),
        Contender("dense, static cache", fixed, static),
        Contender(f"compressed, {kept_as(options)}", compressed, mark_growing(cache)),
    ], token


@torch.no_grad()
def measure(entries: list[Contender], token: torch.Tensor, steps: int) -> None:
    """Compile each, then let them take turns."""
    for entry in tqdm(entries, desc="compile", unit="graph"):
        entry.warm_up(token)
    for _ in tqdm(range(steps), desc="decode", unit="step"):
        for entry in entries:
            entry.seconds.append(entry.run(token))


def table(entries: list[Contender]) -> str:
    """Each contender, and how it compares with the faster dense one."""
    dense = min(entry.median for entry in entries[:-1])
    least = min(min(entry.seconds) for entry in entries[:-1])
    rows = [
        (
            entry.name,
            f"{1e3 * entry.median:.1f}",
            f"{1e3 * min(entry.seconds):.1f}",
            f"{entry.median / dense:.2f}",
            f"{min(entry.seconds) / least:.2f}",
            f"{live_bytes(entry.cache):,}",
            f"{entry.compiling:.0f}",
        )
        for entry in entries
    ]
    headers = ("decode step", "median ms", "min ms", "ratio", "ratio of min", "cache bytes", "compile s")
    return tabulate(rows, headers, colalign=("left",) + ("right",) * 6, disable_numparse=True)


def main(argv: list[str] | None = None) -> None:
    """Measure and print; the ratio is a figure to read, not a test."""
    options = arguments(argv)
    load_before = os.getloadavg()[0]
    model, tokenizer = load(options.model)
    ids = english(tokenizer)[:, : options.context]
    if ids.shape[1] < options.context:
        raise SystemExit(f"--context {options.context} is more than the {ids.shape[1]} tokens of text there are")
    entries, token = contenders(model, ids, options)
    measure(entries, token, options.steps)
    print(f"\n{options.context} tokens of context, {options.steps} steps each, {torch.get_num_threads()} threads,")
    print(f"torch {torch.__version__}; load average at the start {load_before:.2f}\n\n{table(entries)}\n")
    ratio = entries[-1].median / min(entry.median for entry in entries[:-1])
    print(f"compressed over the faster dense step: {ratio:.2f} (bar {BAR}: {'met' if ratio <= BAR else 'missed'})")
    refused = tqcompile.report(model).refusals
    if refused:
        print(f"{len(refused)} caches stayed dense; the first: {refused[0].name}: {refused[0].reason}")


if __name__ == "__main__":
    main()
