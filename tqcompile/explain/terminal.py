"""An explanation as text: for a terminal, and for a bug report."""

from collections.abc import Iterator

from tabulate import tabulate

from tqcompile.explain.explanation import Explanation
from tqcompile.explain.section import Section
from tqcompile.explain.tables import Table, tables


def text(explained: Explanation) -> str:
    """The whole explanation without graphs and kernels."""
    parts = [tabulate(explained.head.items(), tablefmt="plain", disable_numparse=True)]
    parts += explained.notes
    for section in explained.sections:
        parts += _section(section, explained)
    return "\n\n".join(parts)


def _section(section: Section, explained: Explanation) -> Iterator[str]:
    yield f"{section.title}\n{'=' * len(section.title)}"
    if section.trouble:
        yield section.trouble
    for table in tables(section, explained.context, explained.batch):
        yield _table(table)
    kernels = kernel_names(section)
    if kernels:
        yield "kernels that a GPU launches for these: " + ", ".join(kernels)


def kernel_names(section: Section) -> list[str]:
    """The kernels of all graphs, each once."""
    return list(dict.fromkeys(name for graph in section.graphs if graph.texts for name in graph.texts.kernels))


def _table(table: Table) -> str:
    aligned = ["left"] * (len(table.headers) - table.numbers) + ["right"] * table.numbers
    shown = tabulate(table.rows, table.headers, colalign=aligned, disable_numparse=True, preserve_whitespace=True)
    return "\n".join((f"{table.title}:", shown, *table.notes))
