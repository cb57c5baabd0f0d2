"""From what a command line says to the cases that are measured; what it says wrongly is a ValueError."""

import argparse
import re
from pathlib import Path

import torch

from tqcompile import formats
from tqcompile.bench import clock, decoder, figure, rows
from tqcompile.bench.shapes import DTYPE, TASKS, Case, Shape, suite
from tqcompile.options import resolve

# What is measured where nothing is said: a shape that the device holds, and that takes seconds.
DEFAULTS = {
    "cuda": {"context": [32768], "layers": 32, "dtype": "bfloat16"},
    "cpu": {"context": [2048], "layers": 2, "dtype": "float32"},
}
SHAPE = {
    **{"batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128},
    **{"mask": "none", "queries": [1], "softcap": 0.0, "sinks": False, "filled": 0},
}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# Tasks of as many queries as are asked for; others are of one token.
OF_QUERIES = ("attend", "logits")
# Shorter contexts that a figure shows where one context is asked for.
FRACTIONS = (16, 8, 4, 2)


def whole(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def tokens(text: str) -> int:
    """An argparse type: a whole number of tokens, also as tables have it: 32K is 32 * 1024."""
    return whole(text.removesuffix("K")) * (1024 if text.endswith("K") else 1)


def percent(text: str) -> float:
    """An argparse type: a number from 0 to 100."""
    if not re.fullmatch(r"\d+(\.\d*)?", text) or float(text) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100")
    return float(text)


def size(text: str) -> int:
    """An argparse type: a number of bytes, such as 15GiB or 16e9."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)([KMG]i?)?B?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes; examples are 15GiB, 16GB and 16e9")
    return int(float(found[1]) * UNITS[found[2] or ""])


def device(options: argparse.Namespace) -> torch.device:
    """The device to measure.

    Raises:
        ValueError: there is no such device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; leave --device out to measure the CPU")
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def old_rows(options: argparse.Namespace, place: torch.device) -> list[rows.Row]:
    """The rows to measure again; none without `--check`.

    Raises:
        ValueError: their file cannot be read, or they are of another kind of device.
    """
    if options.check is None:
        return []
    found = [row for row in rows.read(options.check) if options.tasks is None or row.case.task in options.tasks]
    if not found:
        raise ValueError(f"--check {options.check} holds no rows of the tasks asked for; `--json` writes some")
    rows.require_device(found, clock.device_name(place), options.check)
    return found


def plan(options: argparse.Namespace, place: torch.device, old: list[rows.Row]) -> list[Case]:
    """The cases to measure.

    Raises:
        ValueError: arguments that contradict each other, name what does not exist, or ask for a file nobody can write.
    """
    _require_one_source(options)
    for name in ("json", "plot"):
        path: Path | None = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no folder {path.parent}; make it, or name another")
    if options.json is not None and options.json.exists():
        rows.read(options.json)
    if options.plot is not None:
        figure.require_drawable(options.plot)
        if options.suite or options.check or "attend" not in (options.tasks or TASKS):
            raise ValueError("--plot draws attention over one shape's contexts; leave --suite, --check and --tasks out")
    if old:
        return [row.case for row in old]
    if options.suite:
        if place.type != "cuda":
            raise ValueError("--suite measures shapes of a GPU, and there is none here; give --batch and --context")
        return [case for case in suite() if options.tasks is None or case.task in options.tasks]
    return _own(options, DEFAULTS[place.type])


def _require_one_source(options: argparse.Namespace) -> None:
    own = [name for name in ("context", "layers", "dtype", "codec", "keys", "values", *SHAPE) if _given(options, name)]
    for source in ("check", "suite"):
        others = [*own, *(name for name in ("model", "suite") if _given(options, name) and name != source)]
        if _given(options, source) and others:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise ValueError(f"--{source} says itself what is measured; leave out {flags}")
    fixed = [name for name in ("heads", "kv_heads", "head_dim") if _given(options, name)]
    if options.model and fixed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in fixed)
        raise ValueError(f"--model {options.model} says its own shape; leave out {flags}")


def _given(options: argparse.Namespace, name: str) -> bool:
    return getattr(options, name) not in (None, False)


def _own(options: argparse.Namespace, defaults: dict) -> list[Case]:
    """The cases of a shape of one's own: every task at each context, attention and scores of each number of queries,
    and attention where a figure wants more points."""
    facts = {**SHAPE, "layers": defaults["layers"]}
    facts |= decoder.shape_facts(options.model) if options.model else {}
    facts |= {name: getattr(options, name) for name in facts if _given(options, name)}
    layers, contexts = facts.pop("layers"), sorted(set(options.context or defaults["context"]))
    chunks = sorted(set(facts.pop("queries")))
    pair, of_step = _pair(options), {"layers": layers, "model": options.model, "inner": options.inner}
    if options.plot and len(chunks) > 1:
        raise ValueError(f"--plot draws one number of queries; leave all but one of --queries {chunks} out")

    def case(task: str, context: int, queries: int) -> Case:
        shape = Shape(context=context, queries=queries, **facts)
        shape = shape if task == "attend" else shape.unmasked
        dtype = options.dtype or DTYPE.get(task, defaults["dtype"])
        return Case(task, shape, *pair, dtype, **(of_step if task == "step" else {}))

    cases = []
    if options.plot and len(contexts) == 1:
        shorter = {contexts[0] // fraction for fraction in FRACTIONS} - {0, contexts[0]}
        cases = [case("attend", context, *chunks) for context in sorted(shorter) if context >= facts["filled"]]
    return cases + [
        case(task, context, queries)
        for context in contexts
        for task in options.tasks or TASKS
        for queries in (chunks if task in OF_QUERIES else [1])
    ]


def _pair(options: argparse.Namespace) -> tuple[str, str]:
    defaults = resolve()
    found = []
    for side, codec in (("keys", defaults.key_codec), ("values", defaults.value_codec)):
        name = getattr(options, side) or options.codec or codec.name
        try:
            formats.codec(name)
            if side == "values":
                formats.check_values(name)
        except ValueError as error:
            flag = side if getattr(options, side) else "codec"
            raise ValueError(f"--{flag}: {error}") from None
        found.append(name)
    return tuple(found)


def model_size(options: argparse.Namespace, cases: list[Case]) -> tuple[int, int]:
    """Layers and bytes of weights of the model that streams are counted for."""
    if options.suite or options.check:
        return 1, 0
    case = cases[-1]
    layers = case.layers or (decoder.shape_facts(options.model)["layers"] if options.model else options.layers or 1)
    if options.weights is not None:
        return layers, options.weights
    width = getattr(torch, case.dtype).itemsize
    return layers, width * decoder.parameter_count(options.model, case.shape, layers)
