"""How time is taken: CUDA graphs on a GPU, calls on a CPU, over buffers that rotate through more than a cache holds."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

ROTATED_BYTES = 256 * 2**20
MOST_COPIES = {"cuda": 512, "cpu": 64}
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**28}
# Calls in one replay of a graph, repeats of it, and milliseconds that all repeats may take where a call is long.
CALLS, MOST_REPEATS, LEAST_REPEATS, BUDGET_MS = 16, 15, 5, 2000

Step = Callable[[int], object]


@dataclass(frozen=True)
class Sample:
    """Median and quartiles of repeated measurements, in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float]) -> "Sample":
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, low, high)


def measure(step: Step, buffers: int, device: torch.device) -> Sample:
    """Times of `step(i)`, i over `buffers`, after a warm-up."""
    for i in range(2):
        step(i % buffers)
    return _replays(step, buffers) if device.type == "cuda" else _calls(step, buffers)


def _replays(step: Step, buffers: int) -> Sample:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            step(i % buffers)
        single = _events(lambda: step(0))
    stream.synchronize()
    rounds = max(1, int(min(CALLS, BUDGET_MS / MOST_REPEATS / single)) // buffers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i in range(buffers):
                step(i)
    calls = rounds * buffers
    first = _events(graph.replay)
    for _ in range(2 if first < BUDGET_MS / MOST_REPEATS else 0):
        graph.replay()
    return Sample.of([_events(graph.replay) / calls for _ in range(_repeats(first))])


def _events(run: Callable) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _calls(step: Step, buffers: int) -> Sample:
    start = time.perf_counter()
    step(0)
    single = 1e3 * (time.perf_counter() - start)
    # A long call reads more than a cache holds by itself.
    buffers = max(1, min(buffers, int(BUDGET_MS / LEAST_REPEATS / single)))

    def pass_ms() -> float:
        start = time.perf_counter()
        for i in range(buffers):
            step(i)
        return 1e3 * (time.perf_counter() - start) / buffers

    return Sample.of([pass_ms() for _ in range(_repeats(pass_ms() * buffers))])


def _repeats(milliseconds: float) -> int:
    return max(LEAST_REPEATS, min(MOST_REPEATS, int(BUDGET_MS / milliseconds)))


def copies_of(size: int, moved: int, device: torch.device) -> int:
    """How many copies of `size` bytes to rotate through, each of which a call moves `moved` bytes of, so that these
    exceed the device's cache several times; at least two, and no more than a quarter of its free memory holds."""
    free = free_bytes(device)
    most = MOST_COPIES[device.type] if free is None else min(MOST_COPIES[device.type], free // 4 // size)
    return max(2, min(most, -(-ROTATED_BYTES // moved)))


def bytes_per_ms(device: torch.device) -> float:
    """Bytes that the device reads and writes in a millisecond of copying."""
    source = torch.randn(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda i: target.copy_(source), 1, device).median


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free for caches; None on a CPU where `psutil` is not installed to ask."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available


def release(device: torch.device) -> None:
    """Give freed memory back, so that the next measurement starts from the same state."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """The kind of device that times can be compared on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


@cache
def surroundings(device: torch.device) -> dict:
    """What a row says of the place and day it was measured: device, versions, date."""
    return {"device": device_name(device), "versions": _versions(), "date": date.today().isoformat()}


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    for name in ("triton", "transformers", "tqcompile"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
