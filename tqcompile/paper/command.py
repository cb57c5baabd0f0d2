"""`python -m tqcompile paper`: figures that papers publish, beside what the codecs here do to random vectors.

All of them, measured:   python -m tqcompile paper
Other vectors:           python -m tqcompile paper --dim 64 --vectors 100000 --seed 1
The page:                python -m tqcompile paper --write docs/papers.md
"""

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tabulate import tabulate

from tqcompile.bench.request import whole
from tqcompile.paper.figure import THEORY_ERRORS, THEORY_SLACK, Figure
from tqcompile.paper.measure import Sample
from tqcompile.paper.papers import COUNTED_DIM, PAPERS

# PolarQuant's blocks; a quarter of it has a codebook of its own.
STEP = 16
HEADERS = ("figure", "published in", "which is", "published", "ours", "std. error", "theory", "ours is off by")

PAGE = """# Papers

Written by `python -m tqcompile paper --write docs/papers.md`; a test holds this page to the codecs.

{notes}

{tables}

{summary}
"""

NOTES = """\
Ours is measured on {vectors:,} Gaussian vectors of d = {dim} numbers (seed {seed}), with the standard error of the
mean, or counted, for d = {counted} as papers do. For |x| = 1 and its decoded x', D_mse is |x' - x|^2, and a bias is
<x, x' - x>, the part of an inner product that is lost; D_prod is <y, x' - x>^2 for |y| = 1, and y knows nothing of x.
Published is what the paper prints: a proved bound, a number computed from its algorithm, as it rounds it, an exact
expression, bits counted, or a claim. Theory is ours, for this d and the bases in use: S is drawn once, so that
numbers for a Gaussian S are that draw's, and the paper's are means over draws."""


def add(commands) -> None:
    """Give the command its place among the others."""
    parser = commands.add_parser(
        "paper",
        help="print published figures of codecs beside measured ones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--dim", type=_dim, default=128, metavar="N", help="numbers of a vector (default 128)")
    what.add_argument("--vectors", type=_vectors, default=16384, metavar="N", help="how many (default 16384)")
    what.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the vectors (default 0)")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=_file, metavar="FILE", help="the figures, for programs")
    out.add_argument("--write", type=_file, metavar="FILE", help="the page, as in docs/papers.md, instead of printing")


def _dim(text: str) -> int:
    number = whole(text)
    if number % STEP:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {STEP}, the block of polar coordinates")
    return number


def _vectors(text: str) -> int:
    number = whole(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text!r} vectors have no standard error; give 2 or more")
    return number


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: name a file in a folder that exists")
    return path


def run(options: argparse.Namespace) -> int:
    """Measure, and print or write what came out; 0, or 1 where ours is not what theory says."""
    found = measure(options.dim, options.vectors, options.seed)
    if options.json:
        options.json.write_text(json.dumps(records(found), indent=1) + "\n")
    notes = NOTES.format(vectors=options.vectors, dim=options.dim, seed=options.seed, counted=COUNTED_DIM)
    if options.write:
        tables = "\n\n".join(f"## {title}\n\n{table(figures, 'github')}" for title, figures in found.items())
        options.write.write_text(PAGE.format(notes=notes, tables=tables, summary=summary(found)))
    else:
        for title, figures in found.items():
            print(f"{title}\n\n{table(figures, 'simple')}\n")
        print(f"{notes}\n\n{summary(found)}")
    return int(any(figure.is_wrong for figures in found.values() for figure in figures))


def measure(dim: int, vectors: int, seed: int) -> dict[str, list[Figure]]:
    """The figures of each paper, by its title, for `vectors` Gaussian vectors of `dim` numbers."""
    with _one_thread():
        sample = Sample(dim, vectors, seed)
        return {paper.title: list(paper.figures(sample)) for paper in PAPERS}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Operators on so few numbers are over before a second thread has begun."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def table(figures: list[Figure], style: str) -> str:
    """The rows of one paper."""
    rows = [_row(figure) for figure in figures]
    return tabulate(rows, HEADERS, style, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 5)


def _row(figure: Figure) -> tuple[str, ...]:
    ours, published = figure.ours, ""
    if figure.published is not None:
        published = f"{figure.published.relation.strip('=') and figure.published.relation + ' '}"
        published += _digits(figure.published.value)
    measured = "no codec" if ours is None else _digits(ours.value, ours.error)
    error = "" if ours is None else f"{ours.error:.1g}" if ours.error else "exact"
    theory = "" if figure.theory is None else _digits(figure.theory)
    return figure.what, figure.where, figure.kind, published, measured, error, theory, figure.off


def _digits(value: float, error: float = 0.0) -> str:
    """Four digits, or as many as a standard error leaves."""
    if error and abs(value) < 100 * error:
        return f"{value:.{max(0, 1 - math.floor(math.log10(error)))}f}"
    return f"{value:.4g}" if abs(value) > 1e-9 else "0"


def records(found: dict[str, list[Figure]]) -> list[dict]:
    """Every figure as a dictionary of plain values."""
    rows = []
    for title, figures in found.items():
        for figure in figures:
            row = {"paper": title, **asdict(figure), "excess": figure.excess}
            row["ours"] = figure.ours and figure.ours._asdict()
            row["published"] = figure.published and figure.published._asdict()
            rows.append(row)
    return rows


def summary(found: dict[str, list[Figure]]) -> str:
    """What deviates by more than rounding and three standard errors, and why, in one line a reason."""
    every = [(title, figure) for title, figures in found.items() for figure in figures]
    compared = [figure for _, figure in every if figure.ours and figure.published]
    off = [(title, figure) for title, figure in every if figure.excess]
    lines = [f"Of {len(compared)} published figures, {len(off)} deviate by more than rounding and 3 standard errors."]
    grouped: dict[str, list[str]] = {}
    for title, figure in off:
        name = f"{title.partition(' (')[0]}, {figure.what} ({figure.off})"
        grouped.setdefault(_reason(figure), []).append(name)
    lines += [f"- {reason}: {'; '.join(names)}." for reason, names in grouped.items()]
    return "\n".join(lines) + "\n\n" + _verdict(every)


def _verdict(every: list[tuple[str, Figure]]) -> str:
    told = [figure for _, figure in every if figure.ours and figure.theory is not None]
    wrong = [f"{title}, {figure.what}" for title, figure in every if figure.is_wrong]
    said = f"Of {len(told)} that theory tells, {len(wrong)} differ from it by more than {THEORY_ERRORS} standard errors"
    return f"{said} and {THEORY_SLACK:.1%}{': ' if wrong else ''}{'; '.join(wrong)}."


def _reason(figure: Figure) -> str:
    if figure.is_wrong:
        return "Ours is not what theory says of it"
    if figure.otherwise:
        return f"Ours is another algorithm on purpose ({figure.otherwise})"
    if figure.is_of_large_vectors:
        return "Published for large d, where theory agrees"
    return f"Not reproduced ({figure.because})" if figure.because else "Not reproduced, and not explained"
