"""`python -m tqcompile validate`: what each codec costs on one's own model and text, and which of them is safe.

    python -m tqcompile validate FOLDER_OR_NAME --text FILE --context 4096 --needle --html page.html

Dense runs first, then each choice of codecs, through the same backend that users have: windows of the text are read in
chunks, so that every scored token is predicted over a cache of codes. The last line says which of them are safe by the
threshold that it states; the exit status is 1 where one is not.
"""

import argparse
import json
from pathlib import Path

from tqcompile import formats
from tqcompile.bench.request import whole
from tqcompile.explain.command import require_folders
from tqcompile.options import INNERS
from tqcompile.validate import load, page, terminal, text
from tqcompile.validate.choice import choices
from tqcompile.validate.run import validate
from tqcompile.validate.settings import Settings
from tqcompile.validate.verdict import Threshold

DEFAULTS = Settings()


def add(commands) -> None:
    """Give the command its place among the others."""
    parser = commands.add_parser(
        "validate",
        help="measure what codecs cost on a model and a text of one's own, and say which are safe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda options: run(options, parser))
    # One line for a mistake: no usage before it.
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("model", metavar="MODEL", help="a folder or name of Hugging Face's, or a file .gguf")
    _add_measured(parser.add_argument_group("what is measured"))
    how = parser.add_argument_group("how")
    how.add_argument("--device", metavar="NAME", help="default: cuda where there is one")
    how.add_argument("--dtype", choices=load.DTYPES, help="of the model (default: its checkpoint's)")
    how.add_argument("--inner", choices=INNERS, default=DEFAULTS.inner, help=f"compiler (default {DEFAULTS.inner})")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--html", type=Path, metavar="FILE", help="one page: the tables and plots")
    out.add_argument("--json", type=Path, metavar="FILE", help="every figure, for programs")


def whole_or_none(text: str) -> int:
    """An argparse type: a whole number, 0 too."""
    return 0 if text == "0" else whole(text)


def _add_measured(what) -> None:
    what.add_argument("--text", type=Path, metavar="FILE", help=f"what it reads (default {text.PYTHON_HELP})")
    what.add_argument(
        "--codecs",
        nargs="+",
        metavar="NAME",
        help="codecs, KEYS/VALUES, or presets, each with +sinks=N, +window=N or +centre behind it, and commas or "
        f"spaces between (default {', '.join(formats.PRESETS)}); codecs: {', '.join(formats.REGISTRY)}",
    )
    for name, kind, said in (
        ("context", whole, "tokens of a window"),
        ("windows", whole, "windows, spread evenly over the text"),
        ("batch", whole, "windows read beside each other"),
        ("generate", whole_or_none, "tokens of a greedy continuation, 0 for none"),
    ):
        default = getattr(DEFAULTS, name)
        what.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{said} (default {default})")
    what.add_argument("--chunk", type=whole, metavar="N", help="tokens read in a call (default a quarter of --context)")
    what.add_argument(
        "--prefill",
        type=whole,
        metavar="N",
        help="tokens of a window's first call (default a chunk); with --chunk 4 what follows sees a kept window as a "
        "generation does",
    )
    what.add_argument("--needle", action="store_true", help="look for needles in a haystack, too: depth x length")
    what.add_argument(
        "--tasks", type=Path, metavar="FOLDER", help="answer the tasks in it, JSONL in LongBench's format"
    )
    what.add_argument(
        "--threshold",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help=f"what is safe: {Threshold.spoken()}",
    )


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure what was asked for; 0, or 1 where a choice is not safe."""
    try:
        settings = _settings(options)
        choices(options.codecs)
        require_folders(options)
        if options.html:
            page.require_drawable()
        document = None if options.text is None else text.read(options.text)
        model, tokenizer = load.load(options.model, load.device(options.device), options.dtype)
        result = validate(model, tokenizer, document, options.codecs, settings)
    except ValueError as error:
        parser.error(str(error))
    result.head["model"] = f"{options.model}: {result.head['model']}"
    if options.text is not None:
        result.head["text"] = f"{result.head['text']} of {options.text}"
    print(terminal.text(result))
    if options.html:
        options.html.write_text(page.page(result))
    if options.json:
        options.json.write_text(json.dumps(result.record(), indent=1) + "\n")
    return 1 if len(result.safe) < len(result.rows) else 0


def _settings(options: argparse.Namespace) -> Settings:
    names = ("context", "windows", "batch", "generate", "chunk", "prefill", "needle", "tasks", "inner")
    threshold = Threshold.parse(options.threshold)
    return Settings(**{name: getattr(options, name) for name in names}, threshold=threshold)
