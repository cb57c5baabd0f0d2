"""What centring, sinks and a window cost a decode step on a GPU, beside dense and plain codes in the same run.

    python examples/option_costs.py [--batch 8] [--context 32768] [--layers 4] [--codec turboquant:4]

The model is a decoder of random weights whose caches are full; each row is the median of five runs of steps under CUDA
graphs. The last column is what a layer takes more than with plain codes, less than nothing where it takes less.
"""

import time

import torch
from smollm2 import costs_parser
from tabulate import tabulate
from tqdm import tqdm

from tqcompile import turboquant
from tqcompile.bench.decoder import Written
from tqcompile.bench.shapes import Shape
from tqcompile.options import INNERS

WARM, REPEATS, STEPS = 4, 5, 20
EXTRAS_OFF = {"sinks": 0, "window": 0, "centre": False}
EXTRAS = {
    "plain codes": {},
    "sinks=4, window=64": {"sinks": 4, "window": 64},
    "centre": {"centre": True},
    "centre, sinks=4, window=64": {"centre": True, "sinks": 4, "window": 64},
}


def step_time(shape: Shape, layers: int, device: torch.device, backend, mode: str | None) -> float:
    """Milliseconds of a step of a decoder that `backend` compiles."""
    torch.compiler.reset()
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with device, torch.no_grad():
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        try:
            decoder = Written(shape, layers, device)
        finally:
            torch.set_default_dtype(default)
        compiled = torch.compile(decoder.model, backend=backend, mode=mode)
        for i in range(WARM):
            decoder.step(compiled, i)
        return sorted(_run(decoder, compiled, device) for _ in range(REPEATS))[REPEATS // 2]


def _run(decoder: Written, compiled, device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for i in range(STEPS):
        decoder.step(compiled, i)
    wait()
    return 1e3 * (time.perf_counter() - start) / STEPS


def main(arguments: list[str] | None = None) -> None:
    parser = costs_parser(__doc__, {"batch": 8, "context": 32768, "layers": 4})
    parser.add_argument("--inner", choices=INNERS, default="inductor", help="compiler (default inductor)")
    given = parser.parse_args(arguments)
    shape, device = Shape(batch=given.batch, context=given.context), torch.device(given.device)
    backends = {"dense": given.inner}
    for name, extras in EXTRAS.items():
        backends[name] = turboquant(keys=given.codec, values=given.codec, inner=given.inner, **EXTRAS_OFF | extras)
    mode = "reduce-overhead" if device.type == "cuda" and given.inner == "inductor" else None
    bar = tqdm(backends.items(), unit="row", disable=None)
    found = {name: step_time(shape, given.layers, device, backend, mode) for name, backend in bar}
    rows = [
        (name, f"{ms:.3f}", f"{found['dense'] / ms:.2f} x", f"{1e3 * (ms - found['plain codes']) / given.layers:+.0f}")
        for name, ms in found.items()
    ]
    print(tabulate(rows, ("step", "ms", "dense over this", "us a layer over plain codes"), disable_numparse=True))


if __name__ == "__main__":
    main()
