"""A result as text, for a terminal; the verdict comes last."""

from tabulate import tabulate

from tqcompile.explain.terminal import shown, wrapped
from tqcompile.validate.result import Result
from tqcompile.validate.tables import tables


def text(result: Result) -> str:
    """The whole result but for plots."""
    parts = [tabulate(result.head.items(), tablefmt="plain", disable_numparse=True), *map(shown, tables(result))]
    return "\n\n".join([*parts, "\n".join(map(wrapped, result.notes)), wrapped(result.verdict)])
