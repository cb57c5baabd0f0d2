"""`python -m tqcompile tune`: times settings of the kernels on int8 units for a shape, and keeps the fastest.

Later runs on this kind of device find it beside the generated kernels, for up to as many heads and tokens as the next
power of two. Nothing is ever timed but by this command.
"""

import argparse
from collections.abc import Iterator

import torch
from tabulate import tabulate
from tqdm import tqdm

from tqcompile import formats
from tqcompile.bench import clock, compressed, request
from tqcompile.bench.check import WrongResult
from tqcompile.bench.request import tokens, whole
from tqcompile.bench.shapes import Case, Shape
from tqcompile.codec import Codec
from tqcompile.coding import split
from tqcompile.kernels import integer, logits, placement, tune, tuned
from tqcompile.kernels.address import DEVICE_TYPE
from tqcompile.layout import layout_of

# What `request.plan` reads and this command does not ask for.
UNASKED = "check", "dtype", "filled", "json", "layers", "mask", "model", "plot", "queries", "sinks", "softcap", "suite"


def add(commands) -> None:
    """Give the command its place among the others."""
    parser = commands.add_parser(
        "tune", help="find the fastest settings of the GPU kernels for a shape", description=__doc__
    )
    parser.set_defaults(run=lambda options: run(options, parser), inner=None, tasks=("attend", "logits"))
    parser.set_defaults(**dict.fromkeys(UNASKED))
    parser.add_argument("--batch", type=whole, metavar="N", help="sequences (default 1)")
    parser.add_argument(
        "--context", type=tokens, nargs="+", metavar="N", help="tokens (default 32768); one or more sizes"
    )
    parser.add_argument("--heads", type=whole, metavar="N", help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=whole, metavar="N", help="key and value heads (default 8)")
    parser.add_argument("--head-dim", type=whole, metavar="N", help="numbers of a head (default 128)")
    parser.add_argument("--codec", metavar="CODEC", help=f"of keys and values: {', '.join(formats.REGISTRY)}")
    parser.add_argument("--keys", metavar="CODEC", help="of keys (default: the backend's)")
    parser.add_argument("--values", metavar="CODEC", help="of values (default: the backend's)")


def device() -> torch.device:
    """The device to search on.

    Raises:
        ValueError: there is none with int8 matrix units.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune times kernels on a GPU, and there is no CUDA device here")
    if torch.cuda.get_device_capability() < integer.CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name()} has no int8 matrix units, and the portable kernels no settings"
        )
    return torch.device("cuda", torch.cuda.current_device())


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Search for attention and for scores at each context; 0, or 1 where a result was wrong."""
    try:
        place = device()
        searches = list(_searches(request.plan(options, place, []), place))
    except ValueError as error:
        parser.error(str(error))
    if not searches:
        parser.error("no kernel on int8 units takes these codecs and this shape: there is nothing to choose")
    for case, key, settings in searches:
        bar = tqdm(settings, desc=case.task, unit="setting", disable=None)
        try:
            times = tuned.search(key, bar, lambda case=case: _milliseconds(case, place))
        except WrongResult as error:
            print(f"not searched: {error}")
            return 1
        print(f"{case.task} of {case.title}, {case.pair}\n\n{_table(times, settings[0])}\n\nkept in {key.path}\n")
    return 0


def _searches(cases: list[Case], place: torch.device) -> Iterator[tuple[Case, tuned.Key, list[tune.Setting]]]:
    """The settings of each case that a kernel on int8 units takes, what is done without a search first."""
    for case in cases:
        shape, codecs = case.shape, (formats.codec(case.keys), formats.codec(case.values))
        if case.task == "attend":
            kernel, choice = integer.sides_of(codecs, (shape.head_dim, shape.head_dim)), integer.choice_of
            kernel = kernel and (kernel, placement.in_ring(kernel, *_planes(shape, codecs), place))
        else:
            kernel, choice = logits.side_of(codecs[0], shape.head_dim), logits.choice_of
        rows = shape.heads // shape.kv_heads
        if kernel is not None and rows <= tune.MOST_ROWS:
            key, default = choice(kernel, rows, shape.batch * shape.kv_heads, shape.context, place)
            # Rows of a tile that no query has are work for nothing.
            table = [s for s in tune.SETTINGS[case.task] if s.block_rows == 4 or rows > 4]
            yield case, key, list(dict.fromkeys((default, *table)))


def _planes(shape: Shape, codecs: tuple[Codec, Codec]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Codes, and scalars, of keys and values as those lie that are timed; no memory is behind them."""
    sizes = shape.batch, shape.kv_heads, shape.context
    layouts = (layout_of(codec, shape.head_dim, torch.bfloat16, DEVICE_TYPE) for codec in codecs)
    return zip(*(split(codec, layout.allocate(sizes, torch.device("meta"))) for codec, layout in zip(codecs, layouts)))


def _milliseconds(case: Case, place: torch.device) -> float:
    """The time of a case by the settings that hold now, after a check of its result."""
    time, *_ = getattr(compressed, case.task)(case, getattr(torch, case.dtype), place)
    clock.release(place)
    return time.median


def _table(times: dict[tune.Setting, float], default: tune.Setting) -> str:
    headers = ("rows", "tokens", "programs", "registers", "ms", "")
    best = min(times, key=times.__getitem__)
    lines = [
        (
            *vars(setting).values(),
            ms,
            " ".join(["fastest"] * (setting == best) + ["without a search"] * (setting == default)),
        )
        for setting, ms in times.items()
    ]
    return tabulate(lines, headers, floatfmt=".4f")
