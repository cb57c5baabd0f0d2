"""`python -m tqcompile sweep`: how many architectures of the transformers package are compressed, and how well.

All of them:    python -m tqcompile sweep
Some of them:   python -m tqcompile sweep --only 'mixture|sparse' --codec CODEC
"""

import argparse
import difflib
import re
import warnings
from pathlib import Path

from tqdm import tqdm

from tqcompile import formats
from tqcompile.bench.request import size, whole
from tqcompile.options import INNERS
from tqcompile.sweep import document, pool, verdict
from tqcompile.sweep.build import FAMILIES, Architecture, architectures
from tqcompile.sweep.compile_time import LAYERS, measure
from tqcompile.sweep.examine import DENSE, INDUCTOR, LOSSLESS, Settings, examine
from tqcompile.sweep.records import Records
from tqcompile.sweep.scenarios import SCENARIOS

NAMES = tuple(scenario.name for scenario in SCENARIOS)


def add(commands) -> None:
    """Give the command its place among the others."""
    parser = commands.add_parser(
        "sweep",
        help="compile a tiny model of every architecture, and count what is compressed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda options: run(options, parser))
    what = parser.add_argument_group("what is examined")
    what.add_argument("--only", metavar="REGEX", default="", help="architectures whose name REGEX is found in")
    what.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all three")
    what.add_argument("--scenarios", nargs="+", choices=NAMES, default=list(NAMES), help="default: all of them")
    what.add_argument("--codec", choices=formats.FOR_VALUES, help="examine a codec, too, against its dense twin")
    what.add_argument("--inductor", action="store_true", help="compile densely with Inductor, too, whatever --inner is")
    what.add_argument("--skip-dense", action="store_true", help="compile densely only where ours raises")
    what.add_argument(
        "--compile-time", metavar="NAME", help=f"instead: what a {LAYERS}-layer model of NAME takes to compile"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--inner", choices=INNERS, default="eager", help="compiler, dense and compressed (default eager)")
    how.add_argument("--jobs", type=whole, default=1, metavar="N", help="processes at a time (default 1)")
    how.add_argument("--seconds", type=whole, default=300, metavar="N", help="an architecture may take (default 300)")
    how.add_argument("--memory", type=size, default=6 * 2**30, metavar="BYTES", help="it may hold (default 6GiB)")
    how.add_argument("--again", action="store_true", help="examine what the file already has, too")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, default=Path("docs/architectures.json"), metavar="FILE", help="the records")
    out.add_argument("--page", type=Path, default=Path("docs/architectures.md"), metavar="FILE", help="made from them")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Examine what was asked for and write the page; 0, or 1 where a number was wrong or ours alone raised."""
    try:
        chosen = _chosen(options)
        if options.compile_time:
            print(measure(_named(options.compile_time)))
            return 0
        records = Records(options.json)
    except ValueError as error:
        parser.error(str(error))
    plain = [mode for mode, wanted in ((DENSE, not options.skip_dense), (INDUCTOR, options.inductor)) if wanted]
    modes = (*plain, LOSSLESS, *((options.codec,) if options.codec else ()))
    settings = Settings(tuple(options.scenarios), modes, options.inner)
    old = {} if options.again else {a: record for a in chosen if (record := records.old(a, settings)) is not None}
    left = [a for a in chosen if a not in old or settings.missing(old[a])]
    print(f"{len(chosen)} architectures, {len(chosen) - len(left)} of them in {options.json} already")
    if left:
        quiet()
        pool.warm_up(lambda: examine(chosen[0], Settings(NAMES[:1], (LOSSLESS,)), lambda record: None))
    limits = pool.Limits(options.seconds, options.memory)
    done = pool.run(left, lambda a, send: examine(a, settings, send, old.get(a)), limits, options.jobs)
    with tqdm(total=len(left), unit="architecture", disable=None) as bar:
        for architecture, record in done:
            records.put(architecture, settings, record)
            bar.set_postfix_str(architecture.name)
            bar.update()
    found = records.of(chosen)
    every = architectures()
    document.write(options.page, records.of(every), [a for a in every if a.key not in records.found])
    print(document.summary(found))
    bad = [(record, problem) for record in found for problem in verdict.problems(record)]
    for record, problem in bad:
        print(f"{record['family']}/{record['name']}, {problem.scenario} {problem.mode}: {problem.what} {problem.where}")
    return 1 if bad else 0


def _named(name: str) -> Architecture:
    for architecture in architectures():
        if architecture.name == name:
            return architecture
    near = difflib.get_close_matches(name, [a.name for a in architectures()], n=1, cutoff=0.0)[0]
    raise ValueError(f"--compile-time {name!r} is no architecture's name; did you mean {near!r}?")


def quiet() -> None:
    """No warnings of what is loaded: they are about models as they are, not about what is examined."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def _chosen(options: argparse.Namespace) -> list[Architecture]:
    try:
        pattern = re.compile(options.only)
    except re.error as error:
        raise ValueError(f"--only {options.only!r} is no regular expression: {error}") from None
    chosen = [a for a in architectures(tuple(options.families)) if pattern.search(a.name)]
    if not chosen:
        raise ValueError(f"--only {options.only!r} is found in no architecture's name; leave it out for all of them")
    return chosen
