"""Runs cases one after the other: the dense side once a shape, the compressed side once a case."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from tqdm import tqdm

from tqcompile import formats
from tqcompile.bench import clock, compressed, dense, steps
from tqcompile.bench.check import WrongResult
from tqcompile.bench.rows import Row
from tqcompile.bench.shapes import Case

# Stands for any codec, where the codec does not matter.
LOSSLESS = formats.PRESETS["lossless"].keys


class Session:
    """What the cases of one run share: the device, the speed of a copy, and the dense times so far."""

    def __init__(self, device: torch.device, step_count: int):
        self.device, self.step_count = device, step_count
        self.speed = clock.bytes_per_ms(device)
        self._dense: dict[Case, object] = {}

    def run(self, cases: Iterable[Case], keep: Callable[[Row], None]) -> list[str]:
        """Measure each case and hand its row to `keep`; what could not be measured comes back as sentences."""
        failures = []
        bar = tqdm(list(cases), desc="bench", unit="row", disable=None)
        for case in bar:
            bar.set_postfix_str(f"{case.task} {case.title} {case.pair}", refresh=True)
            try:
                keep(self._row(case))
            except (WrongResult, dense.NoRival, compressed.NoKernel) as error:
                failures.append(str(error))
            except torch.OutOfMemoryError:
                failures.append(
                    f"{case.task} of {case.title}: out of memory; give a smaller --batch, --context or --layers"
                )
            clock.release(self.device)
        return failures

    def _row(self, case: Case) -> Row:
        dtype = getattr(torch, case.dtype)
        if case.task == "step":
            return self._step(case, dtype)
        task = case.task
        compressed.require_kernel(case, self.device)
        time, rival, dense_bytes = self._once(case, lambda: getattr(dense, task)(case.shape, dtype, self.device))
        clock.release(self.device)
        ours, size, moved = getattr(compressed, task)(case, dtype, self.device)
        return self._filled(case, rival, time, ours, dense_bytes, size, moved)

    def _step(self, case: Case, dtype: torch.dtype) -> Row:
        before = self._once(case, lambda: steps.dense(case, self.step_count, dtype, self.device))
        after = steps.compressed(case, self.step_count, dtype, self.device, before)
        moved = after.weight_bytes + after.cache_bytes
        row = self._filled(case, before.name, before.time, after.time, before.cache_bytes, after.cache_bytes, moved)
        hosts = (before.host.median, after.host.median) if before.host and after.host else None
        return replace(row, hosts=hosts, compile_seconds=(before.compiling, after.compiling))

    def _filled(self, case, rival: str, time, ours, dense_bytes: int, size: int, moved: int) -> Row:
        floor = moved / self.speed / ours.median
        return Row(case, rival, time, ours, dense_bytes, size, floor, **clock.surroundings(self.device))

    def _once(self, case: Case, measure: Callable):
        # A mask is no handicap of the dense side, and its codecs are not read.
        key = replace(case, keys=LOSSLESS, values=LOSSLESS, shape=case.shape.unmasked)
        if key not in self._dense:
            self._dense[key] = measure()
        return self._dense[key]
