"""An explanation as one page that needs no network: tables, each graph before and after, kernels behind a click."""

import html
import re
from collections.abc import Iterable, Iterator

from tqcompile.dump import Texts
from tqcompile.explain.explanation import Explanation
from tqcompile.explain.section import Section, kernels
from tqcompile.explain.tables import Table, tables
from tqcompile.report import Graph

STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 110em; padding: 0 1.5em; }
h2 { border-bottom: 1px solid #8886; margin-top: 2em; }
table { border-collapse: collapse; margin: .3em 0 1em; }
th, td { border-bottom: 1px solid #8884; padding: .25em 1.2em .25em 0; text-align: left; vertical-align: top; }
td { white-space: pre-wrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { font: 12px/1.5 ui-monospace, monospace; margin: 0; overflow-x: auto; padding: .8em; background: #8881; }
summary { cursor: pointer; padding: .25em 0; }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; }
.both > div { min-width: 0; }
.gone { background: #d8404040; } .new { background: #2ea04350; } .changed { background: #d4a01330; }
p { white-space: pre-wrap; }
.trouble { border-left: 4px solid #d84040; padding-left: .8em; }
.comment { opacity: .6; }"""

LEGEND = (
    '<p><span class="gone">taken out</span> by the passes, <span class="new">put in</span>, '
    '<span class="changed">respelled, or given other operands</span>.</p>'
)
# `name: "shape" = ...`, as a graph's code assigns a node; one that assigns an item is named behind that statement.
ASSIGNED = re.compile(r"\s*(?:\w+\[.*\] = .*?;  )?(\w+)(?:: \"[^\"]*\")? = ")
PARAMETER = re.compile(r", (?=[A-Za-z_]\w*: \")")
INPUT = re.compile(r"(?:\s*def forward\(self)?\s*(\w+): \"")


def page(explained: Explanation) -> str:
    """The whole page."""
    title = f"explain {explained.head['explained']}"
    body = [f"<h1>{escape(title)}</h1>", head(explained.head)]
    for section in explained.sections:
        body += _section(section, explained)
    return document(title, body)


def document(title: str, body: Iterable[str]) -> str:
    """A page that holds all it shows."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Text as a page holds it."""
    return html.escape(str(text))


def head(facts: dict[str, str]) -> str:
    """What was run, on what."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f"<table>{rows}</table>"


def _section(section: Section, explained: Explanation) -> Iterator[str]:
    yield f"<h2>{escape(section.title)}</h2>"
    if section.trouble:
        yield f'<p class="trouble">{escape(section.trouble)}</p>'
    for table in tables(section, explained.context, explained.batch):
        yield f"<h3>{escape(table.title)}</h3>"
        yield as_html(table)
    shown = [graph for graph in section.graphs if graph.texts is not None]
    if shown:
        yield f"<h3>graphs before and after</h3>{LEGEND}"
        yield from (_graph(graph, section.calls.get(graph.name, "")) for graph in shown)
    if sources := kernels(section):
        yield "<h3>kernels that a GPU launches for these graphs</h3>"
        yield from (_details(name, f"<pre>{escape(text)}</pre>") for name, text in sources.items())


def as_html(table: Table) -> str:
    """A table and its notes, without its title."""
    numeric = len(table.headers) - table.numbers
    rows = [_row("th", table.headers, numeric), *(_row("td", row, numeric) for row in table.rows)]
    body = f"<table>{''.join(rows)}</table>" if table.rows else ""
    return body + "".join(f"<p>{escape(note)}</p>" for note in table.notes)


def _row(cell: str, values: Iterable, numeric: int) -> str:
    classes = ["" if at < numeric else ' class="number"' for at, _ in enumerate(values)]
    return f"<tr>{''.join(f'<{cell}{c}>{escape(value)}</{cell}>' for c, value in zip(classes, values))}</tr>"


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _graph(graph: Graph, call: str) -> str:
    texts = graph.texts
    if texts.before == texts.after:
        body = f"<pre>{escape(texts.before)}</pre>"
        return _details(f"graph {graph.name}, {call + ', ' if call else ''}which the passes left as it was", body)
    sides = (("before", texts.before, {"gone": texts.gone}), ("after", texts.after, {"new": texts.new}))
    parts = [
        f"<div><h4>{side}</h4><pre>{_marked(text, {**marks, 'changed': texts.changed})}</pre></div>"
        for side, text, marks in sides
    ]
    return _details(f"graph {graph.name}{', ' + call if call else ''}: {_count(texts)}", _both(parts))


def _both(parts: list[str]) -> str:
    return f'<div class="both">{"".join(parts)}</div>'


def _count(texts: Texts) -> str:
    return f"{len(texts.gone)} nodes taken out, {len(texts.new)} put in, {len(texts.changed)} changed"


def _marked(code: str, marks: dict[str, frozenset[str]]) -> str:
    """A graph's code in which the lines of marked nodes have a colour; inputs stand on a line each."""
    kinds = {name: kind for kind, names in marks.items() for name in names}
    lines = []
    for line in code.splitlines():
        if "def forward(" in line:
            lines += [_line(part, INPUT, kinds) for part in PARAMETER.sub(",\n            ", line).split("\n")]
        else:
            lines.append(_line(line, ASSIGNED, kinds))
    return "\n".join(lines)


def _line(line: str, named: re.Pattern, kinds: dict[str, str]) -> str:
    text = escape(line)
    if line.lstrip().startswith("#"):
        return f'<span class="comment">{text}</span>'
    found = named.match(line)
    kind = kinds.get(found[1]) if found else None
    return f'<span class="{kind}">{text}</span>' if kind else text
