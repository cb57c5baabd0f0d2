"""Times attention over compressed caches beside the best dense attention of the same run.

    python -m tqcompile.kernels.bench [--quick]

One decode step, bfloat16 queries. Every figure is a replay of a CUDA graph over buffers that rotate through more memory
than the device's cache holds; the median of repeats, in milliseconds. Attention counts both kernels: the splits of the
cache, and their combination. The floor is the time in which the device copies as many bytes.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from tabulate import tabulate
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tqcompile import formats
from tqcompile.kernels.append import append
from tqcompile.kernels.attend import attend
from tqcompile.layout import layout_of

ROTATED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Shape:
    """One decode step: sequences, tokens of each, heads, head_dim, and the mask that attention is given."""

    batch: int
    tokens: int
    kv_heads: int = 8
    groups: int = 4
    head_dim: int = 128
    mask: str = "none"

    def __str__(self):
        tokens = f"{self.tokens // 1024}K" if self.tokens % 1024 == 0 else str(self.tokens)
        heads = f"{self.kv_heads}x{self.groups} heads, {self.head_dim} dims"
        return f"B{self.batch} x {tokens}, {heads}" + f", {self.mask} mask" * (self.mask != "none")


FOUR, MIXED, THREE, TWO = (tuple(f"turboquant:{bits}" for bits in pair) for pair in ((4, 4), (4, 3), (3, 3), (2, 2)))
LONG = Shape(8, 32768)
SHAPES = (LONG, *(Shape(*size) for size in ((1, 131072), (32, 8192), (1, 32768), (1, 8192), (4, 2048), (1, 1024))))
VARIANTS = (
    *(Shape(8, 32768, head_dim=dim) for dim in (64, 96, 256)),
    *(Shape(8, 32768, groups=groups) for groups in (1, 7, 8)),
    *(Shape(8, 32768, mask=mask) for mask in ("bool", "additive")),
    Shape(8, 32747),
)
OTHERS = tuple(
    pair
    for pair in (*((name, name) for name in formats.REGISTRY), *formats.PRESETS.values())
    if pair not in (FOUR, MIXED, THREE, TWO)
)


def replay_ms(step: Callable[[int], object], buffers: int, repeats: int = 15) -> float:
    """Median time of `step(i)`, i over `buffers`, replayed from one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(2):
            step(i % buffers)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 16 // buffers)
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i in range(buffers):
                step(i)
    times = []
    for _ in range(repeats + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / (rounds * buffers))
    return statistics.median(times[3:])


def buffers_for(bytes_per_copy: int) -> int:
    """Copies that together exceed the device's cache several times."""
    return max(2, min(64, -(-ROTATED_BYTES // bytes_per_copy)))


def bytes_per_ms() -> float:
    """Bytes that the device reads and writes in a millisecond of copying."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / replay_ms(lambda i: target.copy_(source), 1)


def query(shape: Shape) -> torch.Tensor:
    heads = shape.kv_heads * shape.groups
    return torch.randn(shape.batch, heads, 1, shape.head_dim, device="cuda", dtype=torch.bfloat16)


def mask_of(shape: Shape) -> torch.Tensor | None:
    """A mask that hides the first tenth of each sequence."""
    if shape.mask == "none":
        return None
    keep = torch.arange(shape.tokens, device="cuda").expand(shape.batch, 1, 1, -1) >= shape.tokens // 10
    return keep if shape.mask == "bool" else torch.where(keep, 0.0, -torch.inf).to(torch.bfloat16)


def dense_ms(shape: Shape) -> tuple[float, str]:
    """The fastest backend of SDPA over a bfloat16 cache without a mask: (time, its name)."""
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    count = buffers_for(4 * shape.batch * shape.kv_heads * shape.tokens * shape.head_dim)
    q = query(shape)
    caches = [[torch.randn(size, device="cuda", dtype=q.dtype) for _ in range(2)] for _ in range(count)]
    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel(backend):
            try:
                step = lambda i: torch.nn.functional.scaled_dot_product_attention(q, *caches[i], enable_gqa=True)  # noqa: E731
                found.append((replay_ms(step, count), backend.name.split("_")[0].lower()))
            except RuntimeError:
                continue
    return min(found)


def compressed_ms(shape: Shape, pair: tuple[str, str]) -> tuple[float, int]:
    """Attention over the codecs of `pair`: its time, and the bytes of its caches."""
    codecs = [formats.codec(name) for name in pair]
    layouts = [layout_of(codec, shape.head_dim, torch.bfloat16, "cuda") for codec in codecs]
    size = (shape.batch, shape.kv_heads, shape.tokens)
    total = shape.batch * shape.kv_heads * shape.tokens * sum(layout.bytes_per_token for layout in layouts)
    count, q, mask = buffers_for(total), query(shape), mask_of(shape)
    caches = [[layout.allocate(size, "cuda") for layout in layouts] for _ in range(count)]
    for row in range(shape.batch):
        x = torch.randn(1, *size[1:], shape.head_dim, device="cuda", dtype=q.dtype)
        for cache in caches:
            for codec, planes in zip(codecs, cache):
                append(codec, [plane[row : row + 1] for plane in planes], x, None)
    dims = (shape.head_dim, shape.head_dim)
    step = lambda i: attend(q, *caches[i], mask, False, shape.head_dim**-0.5, *codecs, dims)  # noqa: E731
    return replay_ms(step, count), total


def append_ms(batch: int, tokens: int, name: str) -> float:
    """Encoding `tokens` tokens a sequence into a cache of as many."""
    codec = formats.codec(name)
    y = torch.randn(batch, 8, tokens, 128, device="cuda", dtype=torch.bfloat16)
    planes = layout_of(codec, 128, torch.bfloat16, "cuda").allocate((batch, 8, tokens), "cuda")
    return replay_ms(lambda i: append(codec, planes, y, None), 1)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first shape alone, and no appends")
    quick = parser.parse_args().quick
    speed = bytes_per_ms()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copying: {speed / 1e9:.2f} TB/s\n")
    plan = [(LONG, (FOUR, MIXED, THREE, TWO, *OTHERS))]
    if not quick:
        plan += [(shape, (FOUR, MIXED, THREE, TWO)) for shape in SHAPES[1:]]
        plan += [(shape, (FOUR, THREE, TWO)) for shape in VARIANTS]
    rows = []
    for shape, pairs in tqdm(plan, desc="attention", disable=None):
        dense, backend = dense_ms(shape)
        rows.append((str(shape), f"dense bfloat16 ({backend})", dense, 1.0, None))
        for pair in pairs:
            time, size = compressed_ms(shape, pair)
            rows.append(("", " / ".join(pair), time, dense / time, 100 * size / speed / time))
            torch.cuda.empty_cache()
    headers = ("shape", "keys / values", "attend ms", "dense / this", "% of floor")
    print(tabulate(rows, headers, floatfmt=("", "", ".4f", ".2f", ".0f")))
    if not quick:
        rows = [(name, append_ms(8, 1, name), append_ms(1, 8192, name)) for name in formats.REGISTRY]
        print("\n" + tabulate(rows, ("codec", "append B8, 1 token, ms", "append B1, 8K tokens, ms"), floatfmt=".4f"))


if __name__ == "__main__":
    main()
