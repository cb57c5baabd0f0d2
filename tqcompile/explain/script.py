"""The graphs that a script compiles: it runs as it would by itself, under options of ours as its defaults."""

import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from tqcompile.explain.section import Compiled, Section, spoken
from tqcompile.options import as_defaults

ADVICE = """\
{path} compiled nothing with this backend. Write

    model = torch.compile(model, backend="turboquant")

and call what it returns. With Hugging Face's generate, write model.compile(backend="turboquant") instead: generate is
a method of the model, and a compiled copy of it runs the original."""


def section(path: Path, arguments: Sequence[str], options: Mapping[str, str]) -> Section:
    """The graphs that a script compiled in this process. What it prints goes to standard error."""
    compiled, trouble = Compiled(), ""
    with _as_main(path, arguments), as_defaults(options), redirect_stdout(sys.stderr):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                trouble = f"the script ended with status {end.code}"
        except Exception as error:
            traceback.print_exc()
            trouble = f"the script stopped with {spoken(error)}"
    graphs = compiled.graphs()
    return Section(f"script {path.name}", graphs, trouble=trouble or ("" if graphs else ADVICE.format(path=path)))


@contextmanager
def _as_main(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    """What a script finds when Python starts it: its arguments, and its own folder first on the path."""
    argv, search = sys.argv, sys.path[:]
    sys.argv, sys.path[:] = [str(path), *arguments], [str(path.parent.resolve()), *search]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, search
