"""Times attention over compressed caches beside the best dense attention of the same run.

    python -m tqcompile.kernels.bench

One decode step: 8 KV heads, 32 query heads, 128 dims, bfloat16 queries. Every figure is a replay of a CUDA graph over
buffers that rotate through more memory than the device's cache holds; the median of repeats, in milliseconds.
"""

import statistics
from collections.abc import Callable

import torch
import triton
from tabulate import tabulate
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqcompile import formats
from tqcompile.kernels.append import append
from tqcompile.kernels.attend import attend
from tqcompile.layout import layout_of

SHAPES = ((8, 32768), (1, 32768), (1, 8192))
# Each codec for both sides, then the presets that mix two.
PAIRS = (
    *((name, name) for name in formats.REGISTRY),
    *(pair for pair in formats.PRESETS.values() if pair[0] != pair[1]),
)
KV_HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
ROTATED_BYTES = 256 * 2**20


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
    return max(2, min(16, -(-ROTATED_BYTES // bytes_per_copy)))


def dense_ms(batch: int, length: int) -> tuple[float, str]:
    """The best dense bfloat16 attention: its time, and its name."""
    count = buffers_for(4 * batch * KV_HEADS * length * HEAD_DIM)
    q = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    shape = (batch, KV_HEADS, length, HEAD_DIM)
    caches = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(count)]
    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for grouped in (False, True):
            # As more queries of one head: the same arithmetic, for backends that do not split groups well.
            asked = q.view(batch, KV_HEADS, -1, HEAD_DIM) if grouped else q

            def step(i, asked=asked, grouped=grouped):
                return torch.nn.functional.scaled_dot_product_attention(asked, *caches[i], enable_gqa=not grouped)

            try:
                with sdpa_kernel(backend):
                    found.append((replay_ms(step, count), backend.name.split("_")[0].lower()))
            except RuntimeError:
                continue
    return min(found)


def compressed_ms(batch: int, length: int, pair: tuple[str, str]) -> tuple[float, float]:
    """Attention over the codecs of `pair`: its time, and bits an element, scalars included."""
    codecs = [formats.codec(name) for name in pair]
    layouts = [layout_of(codec, HEAD_DIM, torch.bfloat16, "cuda") for codec in codecs]
    size = sum(layout.bytes_per_token for layout in layouts)
    count = buffers_for(batch * KV_HEADS * length * size)
    q = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    caches = []
    for _ in range(count):
        planes = [layout.allocate((batch, KV_HEADS, length), "cuda") for layout in layouts]
        for codec, side in zip(codecs, planes):
            append(codec, side, torch.randn(batch, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=q.dtype), None)
        caches.append(planes)

    def step(i):
        return attend(q, *caches[i], None, False, HEAD_DIM**-0.5, *codecs, (HEAD_DIM, HEAD_DIM))

    return replay_ms(step, count), size * 8 / (2 * HEAD_DIM)


def append_ms(batch: int, tokens: int, name: str) -> float:
    """Encoding `tokens` tokens a sequence into a cache of as many."""
    codec = formats.codec(name)
    y = torch.randn(batch, KV_HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    planes = layout_of(codec, HEAD_DIM, torch.bfloat16, "cuda").allocate((batch, KV_HEADS, tokens), "cuda")
    return replay_ms(lambda i: append(codec, planes, y, None), 1)


def main() -> None:
    """Print the tables."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    rows = []
    for batch, length in SHAPES:
        dense, backend = dense_ms(batch, length)
        shape = f"B{batch} x {length // 1024}K"
        rows.append((shape, f"dense bfloat16 ({backend})", 16.0, dense, 1.0))
        for pair in PAIRS:
            time, bits = compressed_ms(batch, length, pair)
            rows.append((shape, " / ".join(pair), bits, time, dense / time))
            torch.cuda.empty_cache()
    headers = ("shape", "keys / values", "bits", "attend ms", "dense / this")
    print(tabulate(rows, headers, floatfmt=("", "", ".2f", ".4f", ".2f")))
    rows = [(name, append_ms(8, 1, name), append_ms(1, 8192, name)) for name in formats.REGISTRY]
    print("\n" + tabulate(rows, ("codec", "append B8, 1 token, ms", "append B1, 8K tokens, ms"), floatfmt=".4f"))


if __name__ == "__main__":
    main()
