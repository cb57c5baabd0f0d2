"""An explanation as text: for a terminal, and for a bug report."""

import textwrap
from collections.abc import Iterator

from tabulate import tabulate

from tqcompile.explain.explanation import Explanation
from tqcompile.explain.section import Row, Section, kernels, rows, said
from tqcompile.explain.tables import Table, short, tables, title

WIDTH = 120


def text(explained: Explanation) -> str:
    """The whole explanation but for graphs and kernels."""
    parts = [tabulate(explained.head.items(), tablefmt="plain", disable_numparse=True)]
    for section in explained.sections:
        parts += _section(section, explained)
    return "\n\n".join(parts)


def _section(section: Section, explained: Explanation) -> Iterator[str]:
    yield f"{section.title}\n{'=' * len(section.title)}"
    if section.trouble:
        yield "\n".join(wrapped(line) for line in section.trouble.splitlines())
    for table in tables(section, explained.context, explained.batch):
        yield _blocks(rows(section)) if table.title == "caches" else shown(table)
    if names := kernels(section):
        yield wrapped(f"kernels that a GPU launches: {', '.join(names)}")


def wrapped(line: str) -> str:
    """A line of prose as lines that a terminal and a bug report have room for."""
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _blocks(alike: list[Row]) -> str:
    """A table of caches is too wide for lines that people paste: a block for each row of it."""
    return "\n".join(["caches:", *map(_block, alike)])


def _block(row: Row) -> str:
    places = {
        (name, said(place), short(place.where)): None
        for name, found in (("written", row.facts.writes), ("read", row.facts.reads))
        for place in found
    }
    lines = tabulate(list(places), tablefmt="plain", disable_numparse=True).splitlines()
    return "\n".join((title(row), *(f"    {line}" for line in lines)))


def shown(table: Table) -> str:
    """A table with its title and notes."""
    if not table.rows:
        return "\n".join((f"{table.title}:", *table.notes))
    aligned = ["left"] * (len(table.headers) - table.numbers) + ["right"] * table.numbers
    body = tabulate(table.rows, table.headers, colalign=aligned, disable_numparse=True)
    return "\n".join((f"{table.title}:", body, *table.notes))
