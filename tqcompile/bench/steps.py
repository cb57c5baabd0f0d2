"""Whole decode steps, dense and compressed: steps enqueued back to back, and what the host takes for each."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from tqcompile import report, turboquant
from tqcompile.bench import check, clock
from tqcompile.bench.clock import Sample
from tqcompile.bench.compressed import live_bytes
from tqcompile.bench.decoder import HuggingFace, Written
from tqcompile.bench.shapes import Case
from tqcompile.cache import CompressedKV

WARM, REPEATS = 4, 5
# Codes change attention's output, and a step's logits by less: this tells a broken step from a coarse codec.
LOGITS_TOLERANCE = 0.5


@dataclass(frozen=True)
class Steps:
    """A step's time with many under way, its host time, bytes of its caches and weights, seconds of compiling."""

    name: str
    time: Sample
    host: Sample | None
    cache_bytes: int
    weight_bytes: int
    compiling: float
    logits: torch.Tensor


def dense(case: Case, steps: int, dtype: torch.dtype, device: torch.device) -> Steps:
    """The steps of a model that the compiler of the case compiles with a dense cache."""
    return _run(case, steps, dtype, device, None)


def compressed(case: Case, steps: int, dtype: torch.dtype, device: torch.device, expected: Steps) -> Steps:
    """The steps of the same model behind this backend.

    Raises:
        WrongResult: its first logits are far from the dense ones, or it left every cache dense.
    """
    found = _run(case, steps, dtype, device, turboquant(keys=case.keys, values=case.values, inner=case.inner))
    what = f"a step over {case.pair} of {case.title}"
    check.require(f"the logits of {what}", found.logits, expected.logits, LOGITS_TOLERANCE)
    return found


def _run(case: Case, steps: int, dtype: torch.dtype, device: torch.device, backend) -> Steps:
    torch.compiler.reset()
    clock.release(device)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    try:
        with device, torch.no_grad():
            torch.set_default_dtype(dtype)
            subject = _subject(case, steps, device)
            torch.set_default_dtype(default)
            mode = "reduce-overhead" if device.type == "cuda" and case.inner == "inductor" else None
            compiled = torch.compile(subject.model, backend=backend or case.inner, mode=mode)
            start = time.perf_counter()
            logits = subject.step(compiled, 0).clone()
            for i in range(1, WARM):
                subject.step(compiled, i)
            _wait(device)
            compiling = time.perf_counter() - start
            if backend is not None:
                _require_compressed(subject, compiled, case)
            pipelined, host = _times(subject, compiled, steps, device)
        sizes = live_bytes(subject.caches()), weight_bytes(subject.model)
        return Steps(subject.name, pipelined, host, *sizes, compiling, logits)
    finally:
        torch.set_default_dtype(default)


def _subject(case: Case, steps: int, device: torch.device) -> Written | HuggingFace:
    if case.model is None:
        return Written(case.shape, case.layers, device)
    return HuggingFace(case.model, case.shape, WARM + REPEATS * steps, device)


def _require_compressed(subject, compiled: nn.Module, case: Case) -> None:
    caches = subject.caches()
    left = [cache for cache in caches if not isinstance(cache, CompressedKV)]
    if len(left) == len(caches) or (left and case.model is None):
        reasons = [f"{each.name}: {each.reason}" for each in report(compiled).refusals]
        raise check.WrongResult(
            f"{len(left)} of {len(caches)} caches of {case.title} stayed dense: {'; '.join(reasons[:2]) or 'no reason'}"
        )


def _times(subject, compiled: nn.Module, steps: int, device: torch.device) -> tuple[Sample, Sample | None]:
    whole, host, i = [], [], WARM
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            subject.step(compiled, i)
            i += 1
        enqueued = time.perf_counter()
        _wait(device)
        stop = time.perf_counter()
        whole.append(1e3 * (stop - start) / steps)
        host.append(1e3 * (enqueued - start) / steps)
    # On a CPU nothing is enqueued: the host's time is the step's.
    return Sample.of(whole), Sample.of(host) if device.type == "cuda" else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a step reads: all but a table of which it looks up a row."""
    read = [
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    ]
    return sum({parameter.data_ptr(): parameter.nbytes for parameter in read}.values())
