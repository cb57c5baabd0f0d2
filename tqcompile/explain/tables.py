"""The tables of an explanation, as headers and rows of cells: for the terminal, the page and JSON alike."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqcompile.explain.section import Layers, Row, Section, line, rows, said, together
from tqcompile.explain.sizes import of_cache, totals
from tqcompile.facts import CacheFacts, Place

FOLDED = "sequences and heads are one dimension, counted as the heads of one sequence"


@dataclass(frozen=True)
class Table:
    """A titled table; a cell may have several lines. The last `numbers` columns hold numbers."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple, ...]
    notes: tuple[str, ...] = ()
    numbers: int = 0


def tables(section: Section, context: int, batch: int) -> list[Table]:
    """Every table of a section that has a row."""
    alike = rows(section)
    found = (
        _graphs(section),
        _caches(alike),
        _refused(alike, "dense", "left dense"),
        _refused(alike, "decoded", "compressed, but decoded for a whole call and encoded again after it"),
        _decoded(alike),
        _bytes(section, context, batch),
    )
    return [table for table in found if table.rows or table.notes]


def _graphs(section: Section) -> Table:
    shown = tuple(
        (
            graph.name,
            section.calls.get(graph.name, ""),
            len(graph.facts),
            sum(one.form not in ("dense", "decoded") for one in graph.facts),
            graph.reads,
        )
        for graph in section.graphs
    )
    headers = ("graph", "compiled by", "caches", "compressed", "reads of codes")
    if not section.calls:
        headers, shown = (headers[0], *headers[2:]), tuple((row[0], *row[2:]) for row in shown)
    notes = () if any(graph.facts for graph in section.graphs) else ("No graph of this run keeps a cache.",)
    return Table("graphs", headers, shown, notes if shown else (), numbers=3)


def _caches(alike: list[Row]) -> Table:
    shown = tuple(
        (
            ", ".join(row.graphs),
            together(row.names),
            _size(row),
            row.facts.form,
            row.facts.role or "",
            row.facts.codec or "",
            "\n".join(_places(row.facts.writes)),
            "\n".join(_places(row.facts.reads)),
        )
        for row in alike
    )
    headers = ("graph", "cache", "size", "form", "role", "codec", "written by", "read by")
    return Table("caches", headers, shown)


def title(row: Row) -> str:
    """What a row is of, and what became of it, in a line."""
    facts = row.facts
    kept = " ".join(filter(None, (facts.role, f"as {facts.codec}" if facts.codec else "")))
    graphs = f"{'graph' if len(row.graphs) == 1 else 'graphs'} {', '.join(row.graphs)}"
    return f"  {together(row.names)}: {', '.join(filter(None, (facts.form, kept, _size(row), graphs)))}"


def _size(row: Row) -> str:
    facts = row.facts
    if None in (facts.heads, facts.head_dim):
        shape = f"[{', '.join(map(str, facts.shape))}]"
    else:
        shape = f"{_counted(facts.heads, 'head')} x {facts.head_dim} dims"
    return f"{_counted(len(row.names), 'cache')} of {shape} in {_dtype(facts)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _dtype(facts: CacheFacts) -> str:
    return str(facts.dtype).removeprefix("torch.")


def _places(places: tuple[Place, ...]) -> Iterator[str]:
    shown = dict.fromkeys((said(place), short(place.where)) for place in places)
    for what, where in shown:
        yield what
        yield f"    {where}"


def short(where: str) -> str:
    """A line of code below the folder that Python found it in."""
    return line(where, (*sys.path, str(Path.cwd())))


def _refused(alike: list[Row], form: str, what: str) -> Table:
    found: dict[tuple, list[str]] = {}
    for row in alike:
        if row.facts.form == form:
            key = (row.facts.reason, short(row.facts.refused_at), row.facts.remedy)
            found.setdefault(key, []).extend(row.names)
    shown = tuple((together(dict.fromkeys(names)), *why) for why, names in found.items())
    return Table(what, ("cache", "why", "where", "remedy"), shown)


def _decoded(alike: list[Row]) -> Table:
    found: dict[tuple, list[str]] = {}
    for row in alike:
        for place in row.facts.reads if row.facts.form != "decoded" else ():
            if place.over == "decoded":
                found.setdefault((place.operator, short(place.where)), []).extend(row.names)
    shown = tuple((together(dict.fromkeys(names)), *reader) for reader, names in found.items())
    return Table("decoded in front of a reader", ("cache", "reader", "where"), shown)


def _bytes(section: Section, context: int, batch: int) -> Table:
    found = totals(section, context, batch)
    shown = tuple(
        (
            total.what,
            total.caches,
            f"{total.dense_per_token:,}",
            f"{total.kept_per_token:,}",
            f"{total.dense:,}",
            f"{total.kept:,}",
            f"{total.dense / total.kept:.2f} x" if total.kept else "",
        )
        for total in found
        if total.caches
    )
    headers = (
        "caches of",
        "count",
        "dense B/token",
        "kept B/token",
        f"dense, {context:,} x {batch}",
        "kept",
        "smaller",
    )
    notes = [
        f"{total.what}: {why}: {', '.join(names)}"
        for total in found
        for why, names in (("not counted, for nothing says their heads", total.unknown), (FOLDED, total.folded))
        if names
    ]
    forms = {facts.form for graph in section.graphs for facts in graph.facts}
    if "append" in forms:
        notes.append("A growing cache also has spare room: a sixteenth of its length, 32 tokens at least.")
    if section.layers is not None and any(most is not None for _, most in section.layers.kinds):
        notes.append("A layer with a window keeps no more tokens than that.")
    return Table("bytes, counted on the storages of encoded samples", headers, shown, tuple(notes), len(headers) - 1)


def cache_record(facts: CacheFacts, layers: Layers | None) -> dict:
    """A cache's facts as JSON holds them; bytes are None where nothing says its heads."""
    sizes = of_cache(facts, layers)
    places = {
        name: [{**vars(place), "where": short(place.where)} for place in getattr(facts, name)]
        for name in ("writes", "reads")
    }
    return {
        **vars(facts),
        **places,
        "dtype": _dtype(facts) if facts.dtype else None,
        "refused_at": short(facts.refused_at),
        "dense_bytes_per_token": sizes[0] if sizes else None,
        "kept_bytes_per_token": sizes[1] if sizes else None,
    }
