"""One architecture in one process: a tiny model, every scenario in every mode, and what became of its caches."""

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from tqcompile import report
from tqcompile.backend import graph_breaks, turboquant
from tqcompile.report import Report, clear
from tqcompile.sweep.build import Architecture, NotMade, build
from tqcompile.sweep.live import Held, held, summary
from tqcompile.sweep.pool import apart
from tqcompile.sweep.quantised import covers, quantised
from tqcompile.sweep.scenarios import SCENARIOS, NoCache, Said, Scenario, play

DENSE, INDUCTOR, LOSSLESS = "dense", "inductor", "lossless"
# What has nothing of this package in it.
PLAIN = DENSE, INDUCTOR
FIRST = Scenario("first", (12,))

# Of the largest logit. What is lossless differs by the rounding of float32 sums, taken in another order: 1e-6. So does
# a codec, but where such a difference moves a number over the edge between two centroids: one code of four bits that
# is another moved a logit by 3e-3. One state that was quantised by mistake moved them by 5e-2.
LOSSLESS_TOLERANCE, CODEC_TOLERANCE = 1e-4, 1e-2


@dataclass(frozen=True)
class Settings:
    """What is run: scenarios by name, modes and the inner compiler.

    Modes are `dense`, compiled by the inner compiler alone, `inductor`, which is dense by Inductor whatever the inner
    compiler is, `lossless`, and names of codecs.
    """

    scenarios: tuple[str, ...] = tuple(scenario.name for scenario in SCENARIOS)
    modes: tuple[str, ...] = (DENSE, LOSSLESS)
    inner: str = "eager"

    def missing(self, record: dict[str, Any]) -> list[tuple[str, str]]:
        """The scenarios and modes that a record does not have; none where its process came to an end before them."""
        if record.get("not_made") or record.get("died"):
            return []
        ran = {name: scenario.get("modes", self.modes) for name, scenario in record.get("scenarios", {}).items()}
        return [(name, mode) for name in self.scenarios for mode in self.modes if mode not in ran.get(name, ())]


def examine(
    architecture: Architecture, settings: Settings, send: Callable[[dict], None], old: dict[str, Any] | None = None
) -> None:
    """Examine one architecture, and `send` its record whenever there is more to it: the process may not live on.

    What `old`, an earlier record of it, already has stays as it is.
    """
    record: dict[str, Any] = {"family": architecture.family, "name": architecture.name, "model": architecture.model}
    record["scenarios"] = dict((old or {}).get("scenarios", {}))
    send({**record, "stopped": "while the model was made"})
    try:
        model, variant = build(architecture, _try_out)
    except NotMade as error:
        send({**record, "not_made": _short(str(error)), "where": _where(error)})
        return
    record["variant"] = variant
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    missing = settings.missing(record)
    for scenario in SCENARIOS:
        modes = [mode for name, mode in missing if name == scenario.name]
        if modes:
            send({**record, "stopped": f"in scenario {scenario.name}"})
            have = record["scenarios"].get(scenario.name, {}).get("modes", {})
            record["scenarios"][scenario.name] = _compare(scenario, model, modes, settings.inner, have)
    send(record)


def _try_out(model) -> None:
    """Raises where a model cannot be used; one that keeps no cache has been made all the same."""
    try:
        said = play(FIRST, model, model)
    except NoCache:
        return
    if not all(torch.isfinite(logits).all() for logits in said.logits):
        raise ArithmeticError("its logits are not finite")


def _compare(scenario: Scenario, model, modes: list[str], inner: str, have: dict[str, Any]) -> dict[str, Any]:
    """One scenario in `modes`, each against what the untouched model says; `have` are the modes that ran before.

    Where ours raises or is wrong the dense one runs, too: what both have is not ours.
    """
    shorter = replace(scenario, calls=(scenario.calls[0], *(1 for calls in scenario.calls[1:] if calls == 1)))
    try:
        expected = play(scenario, model, model)
    except Exception as error:  # an architecture may refuse a scenario, or only its calls of several tokens
        try:
            expected, found = play(shorter, model, model), {"shortened": _short(f"{type(error).__name__}: {error}")}
            scenario = shorter
        except Exception:
            return {"not_run": _short(f"{type(error).__name__}: {error}"), "where": _where(error)}
    else:
        found = {}
    results = dict(have)
    for mode in (queue := list(modes)):
        # What the backend or the compiler learn from one run must not help, or hurt, the next.
        results[mode] = apart(lambda mode=mode: _run(scenario, model, expected, mode, inner))
        fell = "exception" in results[mode] or wrong(mode, results[mode])
        if fell and mode not in PLAIN and DENSE not in (*queue, *results):
            queue.append(DENSE)
    return {**found, "dense_held": summary(held(expected.cache)), "modes": results}


def _run(scenario: Scenario, model, expected: Said, mode: str, inner: str) -> dict[str, Any]:
    torch.compiler.reset()
    clear()
    graph_breaks()
    try:
        said = play(scenario, model, _compiled(scenario, model, mode, inner))
    except Exception as error:  # whatever it is, it is the result
        return {"exception": _short(f"{type(error).__name__}: {error}"), "where": _where(error), **_seen(model, mode)}
    found = held(said.cache)
    seen = _seen(model, mode)
    if mode not in PLAIN:
        seen["held"] = summary(found)
    if mode not in (*PLAIN, LOSSLESS):
        apart = sorted({item.path.rpartition(".")[2] for item in found if item.compressed and not covers(item.path)})
        if apart:
            return {"no_twin": apart, **seen}
        expected = _twin(scenario, model, mode, found)
    error, step = largest_error(said.logits, expected.logits)
    return {"error": error, "step": step, **seen}


def _compiled(scenario: Scenario, model, mode: str, inner: str) -> Callable:
    if mode in PLAIN:
        backend: Any = inner if mode == DENSE else INDUCTOR
    elif mode == LOSSLESS:
        backend = turboquant(preset=LOSSLESS, inner=inner)
    else:
        backend = turboquant(keys=mode, values=mode, inner=inner)
    return torch.compile(model.forward if scenario.beams else model, backend=backend)


def _twin(scenario: Scenario, model, codec: str, found: list[Held]) -> Said:
    """What the untouched model says over caches that hold what a codec left of each number."""
    paths = {item.path for item in found if item.compressed}
    with quantised(codec, paths) if paths else nullcontext():
        return play(scenario, model, model)


def largest_error(ours: list[torch.Tensor], dense: list[torch.Tensor]) -> tuple[float, int]:
    """The largest difference of a call's logits over their largest absolute value, and the call it is in.

    Infinity where shapes differ or a number of ours is not finite.
    """
    assert len(ours) == len(dense)
    worst, at = 0.0, 0
    for step, (mine, theirs) in enumerate(zip(ours, dense)):
        if mine.shape != theirs.shape or not torch.isfinite(mine).all():
            return float("inf"), step
        error = float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))
        worst, at = (error, step) if error > worst else (worst, at)
    return worst, at


def wrong(mode: str, result: dict) -> bool:
    """Whether the numbers of a mode are beyond its tolerance; NaN is."""
    tolerance = LOSSLESS_TOLERANCE if mode in (LOSSLESS, *PLAIN) else CODEC_TOLERANCE
    return "error" in result and not result["error"] <= tolerance


def _seen(model, mode: str) -> dict[str, Any]:
    """What the backend says it did; the version of what compiled it where that is another one."""
    if mode in PLAIN:
        return {"torch": torch.__version__} if mode == INDUCTOR else {}
    found: Report = report(model)
    reads, refused, decoded = Counter(), Counter(), Counter()
    for graph in found.graphs:
        reads.update(graph.kinds)
        refused.update((r.name, r.reason, _place(r.where), r.remedy) for r in graph.refusals)
        decoded.update((f.operator, _place(f.where)) for f in graph.fallbacks)
    return {
        "graphs": len(found.graphs),
        "breaks": [_short(reason, 150) for reason in graph_breaks()],
        "sites": dict(Counter(site.kind for graph in found.graphs for site in graph.sites)),
        "reads": dict(reads),
        "refusals": _merged(refused),
        "fallbacks": [[*key, count] for key, count in decoded.items()],
        "events": sorted({event for graph in found.graphs for event in graph.events.values()}),
    }


def _merged(refused: Counter) -> list[list]:
    """Refusals by reason, place and remedy: [reason, where, remedy, one cache's name, how many]."""
    found: dict[tuple, list] = {}
    for (name, *key), count in refused.items():
        row = found.setdefault(tuple(key), [*key, name, 0])
        row[-1] += count
    return list(found.values())


def _short(text: str, limit: int = 300) -> str:
    """A message on one line, without the compiler's advice and the machine's paths."""
    text = " ".join(text.partition("Set TORCHDYNAMO_VERBOSE")[0].split())
    return " ".join(_place(word) for word in text.split(" "))[:limit]


def _place(path: str) -> str:
    """A path from the package on."""
    return path.rpartition("site-packages/")[2]


def _where(error: BaseException) -> str:
    """The last line of this package, or else of the model's code, that the innermost exception went through."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    for part in ("/passes/", "/tqcompile/", "/transformers/"):
        lines = [f"{part[1:]}{f.filename.rpartition(part)[2]}:{f.lineno}" for f in frames if part in f.filename]
        lines = [line for line in lines if not line.startswith("tqcompile/sweep/")]
        if lines:
            return lines[-1]
    return ""
