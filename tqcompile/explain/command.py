"""`python -m tqcompile explain`: every KV cache of a model or a script, what became of it, and what it takes.

A model:    python -m tqcompile explain FOLDER_OR_NAME --layers 2 --context 32768 --html page.html
A script:   python -m tqcompile explain script.py --keys CODEC --arguments --its-own arguments

A model is made from its configuration with random weights: no file of weights is read. It reads a few tokens with each
kind of cache, and nothing is generated. What is printed can be pasted into a bug report.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from tqcompile import formats
from tqcompile.backend import Backend
from tqcompile.bench import clock
from tqcompile.bench.request import tokens, whole
from tqcompile.dump import texts_kept
from tqcompile.explain import model, page, script, terminal
from tqcompile.explain.explanation import Explanation
from tqcompile.options import Options, resolve

CACHES = (*model.CACHES, "both")


def add(commands) -> None:
    """Give the command its place among the others."""
    parser = commands.add_parser(
        "explain",
        help="say which caches of a model or a script are compressed, where, how, and which are not and why",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda options: run(options, parser))
    # One line for a mistake: no usage before it.
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("target", metavar="MODEL_OR_SCRIPT", help="a folder or name of Hugging Face's, or a file .py")
    codec = parser.add_argument_group("the codecs")
    codec.add_argument("--keys", metavar="CODEC", help=f"of keys: {', '.join(formats.REGISTRY)}")
    codec.add_argument("--values", metavar="CODEC", help="of values")
    codec.add_argument("--preset", metavar="NAME", help=f"of both: {', '.join(formats.PRESETS)}")
    run_as = parser.add_argument_group("how a model runs")
    run_as.add_argument("--layers", type=whole, metavar="N", help="keep its first N layers (default all)")
    run_as.add_argument("--cache", choices=CACHES, help="kind of cache (default both)")
    run_as.add_argument("--attention", choices=("sdpa", "eager"), help="default: what the model takes by itself")
    counted = parser.add_argument_group("what is counted")
    counted.add_argument(
        "--context", type=tokens, default=4096, metavar="N", help="tokens of a sequence (default 4096)"
    )
    counted.add_argument("--batch", type=whole, default=1, metavar="N", help="sequences (default 1)")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--html", type=Path, metavar="FILE", help="one page: the tables, both graphs, and the kernels")
    out.add_argument("--json", type=Path, metavar="FILE", help="every cache of every graph, for programs")
    parser.add_argument(
        "--arguments", nargs=argparse.REMAINDER, default=[], metavar="ARGUMENT", help="all that follow: the script's"
    )


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Explain what was asked for; 0, or 1 where a run stopped early or nothing was compiled."""
    try:
        codecs = _codecs(options)
        require_folders(options)
        explained = _script(options, codecs) if options.target.endswith(".py") else _model(options, codecs)
    except ValueError as error:
        parser.error(str(error))
    print(terminal.text(explained))
    if options.html:
        options.html.write_text(page.page(explained))
    if options.json:
        options.json.write_text(json.dumps(explained.record(), indent=1) + "\n")
    return 1 if explained.trouble else 0


def _codecs(options: argparse.Namespace) -> dict[str, str]:
    """The options of the backend that the command line gives; what the environment gives is checked too."""
    resolve()
    given = {name: getattr(options, name) for name in ("preset", "keys", "values")}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        try:
            resolve({name: value})
        except ValueError as error:
            raise ValueError(f"--{error}") from None
    return given


def require_folders(options: argparse.Namespace) -> None:
    """Raise ValueError where a file that is asked for could not be written."""
    for name in ("html", "json"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            why = "that is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise ValueError(f"--{name} {path}: {why}")


def _script(options: argparse.Namespace, codecs: dict[str, str]) -> Explanation:
    path = Path(options.target)
    if not path.is_file():
        raise ValueError(f"SCRIPT {path}: there is no such file")
    given = [f"--{name}" for name in ("layers", "cache", "attention") if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: a script makes its own model and caches; leave that out")
    given = {**codecs, "inner": "eager"}
    chosen = resolve(given)
    with texts_kept():
        section = script.section(path, options.arguments, given)
    said = f"{options.target} {' '.join(options.arguments)}".strip()
    place = "cuda" if any(one.device.startswith("cuda") for g in section.graphs for one in g.facts) else "cpu"
    asked = f"{_said(chosen)}; what the script says itself stands over these"
    return _explanation(options, said, asked, place, [section])


def _model(options: argparse.Namespace, codecs: dict[str, str]) -> Explanation:
    if options.arguments:
        raise ValueError("--arguments are a script's: MODEL_OR_SCRIPT is to be a file .py")
    if not Path(options.target).exists() and model.is_path(options.target):
        raise ValueError(f"MODEL {options.target}: there is no such folder")
    full = model.config_of(options.target)
    made = model.build(model.shortened(full, options.layers), options.attention)
    chosen = resolve({**codecs, "inner": "eager", "strict": False})
    kinds = [kind for kind in model.CACHES if options.cache in (None, "both", kind)]
    with texts_kept():
        sections = list(model.sections(made, full, kinds, Backend(chosen), min(options.batch, 2)))
    return _explanation(options, model.facts(made, full), _said(chosen), "cpu", sections)


def _explanation(options, what: str, asked: str, place: str, sections: list) -> Explanation:
    facts = clock.surroundings(torch.device(place))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    python = ".".join(map(str, sys.version_info[:3]))
    head = {
        "explained": options.target,
        "what ran": what,
        "options": asked,
        "versions": f"{versions}, Python {python}",
        "device": facts["device"],
        "date": facts["date"],
    }
    return Explanation(head, tuple(sections), options.context, options.batch)


def _said(options: Options) -> str:
    extras = f", {options.chosen.extras}" * bool(options.chosen.extras)
    said = f"keys {options.key_codec.name}, values {options.value_codec.name}{extras}, inner {options.inner}"
    return said + (f", without {', '.join(options.disable)}" if options.disable else "")
