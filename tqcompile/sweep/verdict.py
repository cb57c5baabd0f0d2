"""What a record says about its architecture: everything that the summary counts and the table shows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqcompile.sweep.examine import DENSE, LOSSLESS, PLAIN, wrong

Record = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong: an exception that dense compilation does not have, or numbers beyond the tolerance."""

    scenario: str
    mode: str
    what: str
    where: str


def made(record: Record) -> bool:
    return bool(record.get("scenarios"))


def results(record: Record, mode: str) -> Iterator[tuple[str, dict]]:
    """The scenarios that ran in `mode`, and what came out."""
    for name, scenario in record["scenarios"].items():
        if mode in scenario.get("modes", {}):
            yield name, scenario["modes"][mode]


def compiles(scenario: dict) -> bool:
    """Whether plain compilation gets through a scenario: what it does not says nothing of what this package keeps.

    It is not run where neither ours raised nor its numbers were wrong.
    """
    return "exception" not in scenario.get("modes", {}).get(DENSE, {})


def codecs(record: Record) -> list[str]:
    """The modes of a record that are names of codecs."""
    found = {mode for scenario in record["scenarios"].values() for mode in scenario.get("modes", {})}
    return sorted(found - {*PLAIN, LOSSLESS})


def caches(record: Record, kind: str = "self", mode: str = LOSSLESS) -> tuple[int, int]:
    """How many tensors of `kind` were compressed after each scenario, and how many there were: all scenarios together.

    Where a scenario fell, the caches that the untouched model keeps count as dense; it does not count where plain
    compilation falls, too.
    """
    compressed = total = 0
    for name, result in results(record, mode):
        if not compiles(record["scenarios"][name]):
            continue
        row = result.get("held", record["scenarios"][name]["dense_held"]).get(kind, {"compressed": 0, "count": 0})
        compressed, total = compressed + row["compressed"], total + row["count"]
    return compressed, total


def has_cache(record: Record) -> bool:
    """Whether the untouched model keeps keys and values of its own tokens, in a scenario that can be compiled."""
    return any(
        "self" in scenario.get("dense_held", ()) and compiles(scenario) for scenario in record["scenarios"].values()
    )


def all_compressed(record: Record) -> bool:
    compressed, total = caches(record)
    return compressed == total > 0


def all_on_codes(record: Record) -> bool:
    """Whether nothing that reads a cache has it decoded in front of it."""
    read = _read(record)
    return bool(read) and not any(result["fallbacks"] for result in read)


def all_fused(record: Record) -> bool:
    """Whether every read of codes is the one operator that attends over them."""
    return all_on_codes(record) and all(set(result["reads"]) == {"attend"} for result in _read(record))


def _read(record: Record) -> list[dict]:
    counted = (result for name, result in results(record, LOSSLESS) if compiles(record["scenarios"][name]))
    return [result for result in counted if result.get("reads") or result.get("fallbacks")]


def problems(record: Record) -> list[Problem]:
    """What this package does to the architecture that dense compilation does not."""
    found = []
    if "died" in record:
        found.append(Problem(record.get("stopped", ""), "", record["died"], ""))
    for name, scenario in record["scenarios"].items():
        modes = scenario.get("modes", {})
        for mode, result in modes.items():
            if mode in PLAIN:
                continue
            if "exception" in result and "exception" not in modes.get(DENSE, {}):
                found.append(Problem(name, mode, result["exception"], result["where"]))
            elif wrong(mode, result) and not _excused(mode, modes):
                found.append(Problem(name, mode, f"error {result['error']:.1e} in call {result['step']}", ""))
            found += [Problem(name, mode, what, "") for what in _mistaken(result)]
    return found


def _excused(mode: str, modes: dict[str, dict]) -> bool:
    """Whether dense compilation is wrong by as much, in the same call: then it is not ours.

    A codec is excused where what is lossless is: its twin is not compiled.
    """
    result, dense = modes.get(LOSSLESS, {}) if mode != LOSSLESS else modes[mode], modes.get(DENSE, {})
    if not wrong(DENSE, dense) or "error" not in result:
        return False
    return math.isclose(result["error"], dense["error"], rel_tol=1e-3) and result["step"] == dense["step"]


def _mistaken(result: dict) -> Iterator[str]:
    """What the numbers of a lossless codec do not show."""
    held = result.get("held", {})
    if held.get("state", {}).get("compressed"):
        yield "the state of a recurrence or a convolution is compressed as if it were a cache"
    said = any(result.get(field) for field in ("refusals", "events", "breaks"))
    if held.get("self", {}).get("dense") and not said:
        yield f"left dense, and the report does not say why: {', '.join(held['self']['dense'])}"


def worst(record: Record, mode: str) -> float | None:
    """The largest error of `mode` in any scenario; None where it never ran to the end."""
    errors = [result["error"] for _, result in results(record, mode) if "error" in result]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error, default=None)


def dense_fails(record: Record, mode: str = DENSE) -> list[str]:
    """The scenarios that plain compilation, without this package, does not get through or gets wrong."""
    return [name for name, result in results(record, mode) if "exception" in result or wrong(mode, result)]


def reasons(record: Record, mode: str = LOSSLESS) -> Iterator[tuple[str, str]]:
    """Why something of an architecture stays dense, is decoded for a reader or was not run: what, and where."""
    for _, result in [*results(record, mode), *(pair for codec in codecs(record) for pair in results(record, codec))]:
        yield from ((reason, where) for reason, where, *_ in result.get("refusals", ()))
        yield from ((f"decoded in front of {operator}", where) for operator, where, _ in result.get("fallbacks", ()))
        yield from ((f"a call ran dense: {event}", "") for event in result.get("events", ()))
        if result.get("no_twin"):
            yield f"not compared under a codec, its twin would hold dense: {', '.join(result['no_twin'])}", ""
        if result.get("held", {}).get("self", {}).get("dense"):
            yield from ((f"Dynamo breaks the graph: {broken}", "") for broken in result.get("breaks", ()))
    for name, scenario in record["scenarios"].items():
        if "not_run" in scenario:
            yield f"{name} is not run: {scenario['not_run']}", scenario["where"]
        elif "shortened" in scenario:
            yield f"{name} is run without its calls of several tokens: {scenario['shortened']}", ""
