"""One architecture in one process: a tiny model, every scenario in every mode, and what became of its caches."""

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tqcompile import report
from tqcompile.backend import turboquant
from tqcompile.report import Report, clear
from tqcompile.sweep.build import Architecture, NotMade, build
from tqcompile.sweep.live import held
from tqcompile.sweep.scenarios import SCENARIOS, NoCache, Said, Scenario, play

DENSE, LOSSLESS = "dense", "lossless"


@dataclass(frozen=True)
class Settings:
    """What is run: scenarios by name, modes (`dense`, `lossless`, or the name of a codec) and the inner compiler."""

    scenarios: tuple[str, ...] = tuple(scenario.name for scenario in SCENARIOS)
    modes: tuple[str, ...] = (LOSSLESS,)
    inner: str = "eager"
    corrupt: Callable[[Said], None] | None = field(default=None, compare=False)


def examine(architecture: Architecture, settings: Settings, send: Callable[[dict], None]) -> None:
    """Examine one architecture, and `send` its record whenever there is more to it: the process may not live on."""
    record: dict[str, Any] = {"family": architecture.family, "name": architecture.name, "model": architecture.model}
    record["scenarios"] = {}
    send({**record, "stopped": "while the model was made"})
    first = SCENARIOS[0]
    try:
        model, variant = build(architecture, lambda model: _try_out(first, model))
    except NotMade as error:
        cause = error.__cause__
        send({**record, "not_made": _short(str(error)), "where": _where(cause)})
        return
    record["variant"] = variant
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    for scenario in SCENARIOS:
        if scenario.name in settings.scenarios:
            send({**record, "stopped": f"in scenario {scenario.name}"})
            record["scenarios"][scenario.name] = _compare(scenario, model, settings)
    send(record)


def _try_out(scenario: Scenario, model) -> None:
    """A model that keeps no cache has been made all the same."""
    try:
        said = play(scenario, model, model, {})
    except NoCache:
        return
    if not all(torch.isfinite(logits).all() for logits in said.logits):
        raise ArithmeticError("its logits are not finite")


def _compare(scenario: Scenario, model, settings: Settings) -> dict[str, Any]:
    """One scenario in every mode, each against what the untouched model says."""
    try:
        expected = play(scenario, model, model, {})
    except Exception as error:  # an architecture may refuse a scenario in a way of its own
        return {"not_run": _short(f"{type(error).__name__}: {error}"), "where": _where(error)}
    found: dict[str, Any] = {"held_dense": [item.as_row() for item in held(expected.cache)], "modes": {}}
    for mode in settings.modes:
        found["modes"][mode] = _run(scenario, model, expected, mode, settings)
    if DENSE not in settings.modes and any("exception" in result for result in found["modes"].values()):
        found["modes"][DENSE] = _run(scenario, model, expected, DENSE, settings)
    return found


def _run(scenario: Scenario, model, expected: Said, mode: str, settings: Settings) -> dict[str, Any]:
    torch.compiler.reset()
    clear()
    try:
        said = play(scenario, model, _compiled(scenario, model, mode, settings.inner), {})
    except Exception as error:  # whatever it is, it is the result
        return {"exception": _short(f"{type(error).__name__}: {error}"), "where": _where(error), **_seen(model)}
    if settings.corrupt is not None:
        settings.corrupt(said)
    error, step = largest_error(said.logits, expected.logits)
    result = {"error": error, "step": step}
    if mode != DENSE:
        result.update(_seen(model), held=[item.as_row() for item in held(said.cache)])
    return result


def _compiled(scenario: Scenario, model, mode: str, inner: str) -> Callable:
    if mode == DENSE:
        backend: Any = inner
    elif mode == LOSSLESS:
        backend = turboquant(preset=LOSSLESS, inner=inner)
    else:
        backend = turboquant(keys=mode, values=mode, inner=inner)
    return torch.compile(model.forward if scenario.beams else model, backend=backend)


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


def _seen(model) -> dict[str, Any]:
    """What the backend says it did."""
    found: Report = report(model)
    kinds, refused, decoded = Counter(), Counter(), Counter()
    for graph in found.graphs:
        kinds.update(graph.kinds)
        refused.update((r.reason, r.where, r.remedy) for r in graph.refusals)
        decoded.update((f.operator, f.where) for f in graph.fallbacks)
    return {
        "graphs": len(found.graphs),
        "sites": dict(Counter(site.kind for graph in found.graphs for site in graph.sites)),
        "reads": dict(kinds),
        "refusals": [[*key, count] for key, count in refused.items()],
        "fallbacks": [[*key, count] for key, count in decoded.items()],
        "events": sorted({event for graph in found.graphs for event in graph.events.values()}),
    }


def _short(text: str, limit: int = 400) -> str:
    """The first lines of a message, without the compiler's advice and the machine's paths."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines)[:limit]


def _where(error: BaseException) -> str:
    """The last line of this package, or else of the model's code, that the innermost exception went through."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    for part in ("/passes/", "/tqcompile/", "/transformers/"):
        lines = [f"{part[1:]}{f.filename.rpartition(part)[2]}:{f.lineno}" for f in frames if part in f.filename]
        lines = [line for line in lines if "tqcompile/sweep/" not in line]
        if lines:
            return lines[-1]
    return ""
