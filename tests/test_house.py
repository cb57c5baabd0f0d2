"""The house itself: who may know whom, how large a room may be, and where a format may be named."""

import ast
import pathlib
import re

import pytest

from tqcompile.formats import REGISTRY

ROOT = pathlib.Path(__file__).parent.parent

# From the ground up. A module imports from lower floors only; modules of one room may know each other.
FLOORS = (
    ("codec", "scores", "recent"),
    ("tables", "layout", "trellis"),
    ("allocation", "coding"),
    ("formats",),
    ("reference",),
    ("options",),
    ("kernels", "cpu"),
    ("ops",),
    ("cache+adopt+buffer+centre+centred+dispatch+dispatch_writes+encoding+followed+guarded+principal+readonly",),
    ("report",),
    ("passes",),
    ("backend+runtime+dump+facts+reads",),
    ("__init__",),
    ("bench",),
    ("explain",),
    ("paper",),
    ("sweep", "validate"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOM = {module: room for room in FLOOR for module in room.split("+")}

COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "functorch")
# A hint about a tensor's sizes, and the folder that all generated code goes to.
ALLOWED = {
    "buffer": ("torch._dynamo.maybe_mark_dynamic",),
    "runtime": ("torch._dynamo.maybe_mark_dynamic",),
    "kernels.emit": ("torch._inductor.runtime.cache_dir_utils",),
}

FILE_LINES = 300
FUNCTION_LINES = 40
KERNEL_LINES = 100


def modules():
    """Every module of the package by its name inside it: `codec`, `passes.sites`."""
    files = {path.stem: path for path in (ROOT / "tqcompile").glob("*.py")}
    rooms = ("bench", "explain", "paper", "sweep", "validate")
    for room in ("passes", "kernels", *(f"tqcompile/{room}" for room in rooms)):
        files |= {f"{pathlib.Path(room).name}.{path.stem}": path for path in (ROOT / room).glob("*.py")}
    return dict(sorted(files.items()))


EVERY_MODULE = pytest.mark.parametrize(("name", "path"), modules().items(), ids=modules())


def parse(path):
    return ast.parse(path.read_text(), str(path))


def dotted(node):
    """`a.b.c` of an attribute chain, or None where it does not start at a name."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return base and f"{base}.{node.attr}"


def imported(tree):
    """Every dotted name that an import statement mentions, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def mentioned(tree):
    """Imported names, and attribute chains as they are written."""
    return {
        *imported(tree),
        *filter(None, (dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))),
    }


def under(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def room_of(name):
    return ROOM[name.split(".")[0]]


def test_every_module_has_its_place_in_the_order_of_knowledge():
    assert {name.split(".")[0] for name in modules()} <= set(ROOM)


@EVERY_MODULE
def test_a_module_knows_only_the_floors_below_it(name, path):
    known = {target.split(".", 1)[1] for target in imported(parse(path)) if target.startswith("tqcompile.")}
    for target in sorted(known):
        # A name that is no module comes from the package's front door, the topmost floor.
        room = ROOM.get(target.split(".")[0], "__init__")
        here = room_of(name)
        assert room == here or FLOOR[room] < FLOOR[here], f"{name} may not import {target}"


@EVERY_MODULE
def test_kernels_know_no_graphs_and_passes_no_triton(name, path):
    foreign = {"kernels": ("torch.fx",), "passes": ("triton",)}.get(room_of(name), ())
    assert not [use for use in mentioned(parse(path)) if under(use, foreign)]


@EVERY_MODULE
def test_only_the_backend_names_the_compilers_around_it(name, path):
    if name == "backend":
        return
    allowed = ALLOWED.get(name, ())
    uses = {use for use in mentioned(parse(path)) if under(use, COMPILERS) and not under(use, allowed)}
    # An attribute chain is seen at each of its lengths; the prefixes of an allowed one are not uses of their own.
    assert not {use for use in uses if not any(whole.startswith(use + ".") for whole in allowed)}


@EVERY_MODULE
def test_only_the_options_read_the_environment(name, path):
    if name != "options":
        assert not [use for use in mentioned(parse(path)) if under(use, ("os.environ", "os.getenv", "os.environb"))]


def docstring(node):
    first = node.body[0] if node.body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first if is_text else None


def prose(tree):
    """Strings that no decision can hang on: those that stand alone, and what an exception says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value
        if isinstance(node, ast.Raise):
            yield from ast.walk(node)


@EVERY_MODULE
def test_no_format_is_named_outside_the_registry(name, path):
    if name == "formats":
        return
    families = {codec.partition(":")[0] for codec in REGISTRY}
    # The backend shares its name with a family of codecs.
    families -= {"turboquant"} if name in ("__init__", "backend") else set()
    named = "|".join(sorted(re.escape(codec) for codec in REGISTRY))
    tree = parse(path)
    exempt = {id(node) for node in prose(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exempt:
            text = node.value
            is_named = text in families or (text != "identity" and re.search(rf"(?<![\w:])({named})(?![\w:])", text))
            assert not is_named, f"{name}, line {node.lineno}: {text!r}"


@EVERY_MODULE
def test_no_decision_hangs_on_the_name_of_a_codec(name, path):
    if name == "formats":
        return
    for node in ast.walk(parse(path)):
        operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        assert not [text for text in map(ast.unparse, operands) if re.search(r"codec\w*\.name\b", text)], node.lineno


@EVERY_MODULE
def test_a_file_reads_before_lunch(name, path):
    assert len(path.read_text().splitlines()) <= FILE_LINES


@EVERY_MODULE
def test_a_function_fits_on_a_screen(name, path):
    limit = KERNEL_LINES if room_of(name) == "kernels" else FUNCTION_LINES
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            said = docstring(node)
            lines = node.end_lineno - node.lineno + 1 - (said.end_lineno - said.lineno + 1 if said else 0)
            assert lines <= limit, f"{name}.{node.name} has {lines} lines"


def test_passes_and_kernels_are_no_packages_of_their_own():
    """An importable top-level package `kernels` would shadow the distribution of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "passes" / "__init__.py").exists()
