"""A result as one page that needs no network: the verdict, plots, and every table."""

import base64
import io

from tqcompile.explain.page import as_html, document, escape, head
from tqcompile.validate import plots
from tqcompile.validate.result import Result
from tqcompile.validate.tables import tables


def require_drawable() -> None:
    """Raise ValueError where nothing can be drawn, before anything is measured for it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--html draws with matplotlib, which is not installed: pip install matplotlib") from None


def page(result: Result) -> str:
    """The whole page."""
    title = f"validate {result.head['model'].partition(': ')[0]}"
    body = [f"<h1>{escape(title)}</h1>", f"<p><strong>{escape(result.verdict)}</strong></p>", head(result.head)]
    for heading, figure in plots.figures(result):
        body.append(f'<h2>{escape(heading)}</h2><img alt="{escape(heading)}" src="{_drawing(figure)}">')
    for table in tables(result):
        body.append(f"<h2>{escape(table.title)}</h2>{as_html(table)}")
    body += [f"<p>{escape(note)}</p>" for note in result.notes]
    return document(title, body)


def _drawing(figure) -> str:
    """A figure as an address that holds it: a drawing of its own, whose names are nobody else's."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue().encode()).decode()
