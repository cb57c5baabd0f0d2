"""What is explained: the graphs of one run, and caches that differ by their layer alone as one row."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqcompile.facts import CacheFacts, Place
from tqcompile.report import Graph, report

FRAME = re.compile(r"(.*), line (\d+), in (.*)", re.DOTALL)


@dataclass(frozen=True)
class Layers:
    """The layers of a model, by what kind of cache each keeps; the first `kept` of them ran.

    A kind is a name and how many tokens such a layer keeps at most: None where it keeps all.
    """

    kinds: tuple[tuple[str, int | None], ...]
    kept: int


@dataclass(frozen=True)
class Section:
    """Graphs that one run compiled. `calls` says which call compiled a graph, `trouble` what ended the run early."""

    title: str
    graphs: tuple[Graph, ...]
    calls: dict[str, str] = field(default_factory=dict)
    layers: Layers | None = None
    trouble: str = ""


class Compiled:
    """What is compiled from here on, whatever becomes of the records that there were before."""

    def __init__(self):
        self._old = report().graphs

    def graphs(self) -> tuple[Graph, ...]:
        """The new records; a name that Dynamo gave again, after a reset, is told apart by a number."""
        old, times, found = {id(graph) for graph in self._old}, Counter(), []
        for graph in report().graphs:
            if id(graph) not in old:
                times[graph.name] += 1
                again = times[graph.name]
                found.append(graph if again == 1 else replace(graph, name=f"{graph.name} ({again})"))
        return tuple(found)


@dataclass(frozen=True)
class Row:
    """Caches of some graphs that are alike in everything but a number in their names; `facts` are the first one's."""

    graphs: tuple[str, ...]
    names: tuple[str, ...]
    facts: CacheFacts


def rows(section: Section) -> list[Row]:
    """The caches of a section, alike ones together, in the order that the graphs were compiled in."""
    found: dict[tuple, Row] = {}
    for graph in section.graphs:
        for facts in graph.facts:
            key, name = _alike(facts), plain(facts.name)
            row = found.setdefault(key, Row((), (), facts))
            graphs = dict.fromkeys((*row.graphs, graph.name))
            found[key] = replace(row, graphs=tuple(graphs), names=tuple(dict.fromkeys((*row.names, name))))
    return list(found.values())


def _alike(facts: CacheFacts) -> tuple:
    places = [(p.kind, p.operator, p.where, p.over) for p in (*facts.writes, *facts.reads)]
    pattern = re.sub(r"\d+", "#", re.sub(r"_\d+$", "", facts.name))
    sizes = facts.heads, facts.head_dim, facts.dtype, facts.device
    said = facts.reason, facts.remedy, facts.refused_at
    return pattern, facts.form, facts.role, facts.codec, sizes, tuple(places), said


def plain(name: str) -> str:
    """A tensor's path as the model's author would write it, without Dynamo's dictionaries."""
    name = re.sub(r"\._(modules|buffers|parameters)\['([^']*)'\]", r".\2", name)
    return re.sub(r"^L\['(\w+)'\](\['(\w+)'\])?", lambda found: found[3] or found[1], name)


def together(names: Iterable[str]) -> str:
    """`layers[0].keys`, `layers[1].keys` -> `layers[0-1].keys`; names that differ otherwise, side by side."""
    names = list(names)
    parts = [re.split(r"(\d+)", name) for name in names]
    varying = {at for part in parts for at in range(len(part)) if part[at : at + 1] != parts[0][at : at + 1]}
    if len(names) > 1 and len({len(part) for part in parts}) == 1 and len(varying) == 1 and min(varying) % 2:
        (at,) = varying
        return "".join((*parts[0][:at], _ranges(int(part[at]) for part in parts), *parts[0][at + 1 :]))
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} ... {names[-1]}"


def _ranges(numbers: Iterable[int]) -> str:
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in found)


def line(where: str, roots: Iterable[str]) -> str:
    """`file:line`, the file below that one of `roots` which is nearest to it."""
    frame = FRAME.fullmatch(where)
    if frame is None:
        return where
    path = Path(frame[1])
    homes = [root for root in map(Path, roots) if root.is_absolute() and path.is_relative_to(root)]
    nearest = max(homes, key=lambda root: len(root.parts), default=None)
    return f"{path.relative_to(nearest) if nearest else path}:{frame[2]}"


def said(place: Place) -> str:
    """What a place does, in a few words."""
    if not place.over:
        return place.operator
    what = place.operator if place.kind == "other" else place.kind
    return f"{what} over {place.over if place.over == 'codes' else f'{place.over} numbers'}"


def spoken(error: Exception) -> str:
    """An exception in a line: its first paragraph, which says what happened before any advice on how to see more."""
    return f"{type(error).__name__}: {' '.join(str(error).strip().split(chr(10) * 2)[0].split())}"


def kernels(section: Section) -> dict[str, str]:
    """The sources of the kernels that a GPU launches for the graphs of a section, by name."""
    return {name: text for graph in section.graphs if graph.texts for name, text in graph.texts.kernels.items()}
