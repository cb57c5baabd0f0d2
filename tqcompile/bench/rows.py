"""A measured row, the file that holds many, and how two measurements of one case are compared."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from tabulate import tabulate

from tqcompile.bench.clock import Sample
from tqcompile.bench.shapes import Case, Shape

TITLES = {
    "attend": "attention of one query, or of as many as a row says",
    "logits": "queries times keys, without a softmax: scores in float32",
    "append": "appending one token of keys and values",
    "prefill": "encoding the context, beside causal attention over it",
    "step": "a whole decode step, many enqueued",
}


@dataclass(frozen=True)
class Row:
    """A case as it was measured: both times, bytes of both caches, and where and when.

    `floor` is the time that the bytes it must move take at the speed of a copy, over its time. `hosts` are the host's
    milliseconds for a dense and a compressed step.
    """

    case: Case
    rival: str
    dense: Sample
    compressed: Sample
    dense_bytes: int
    compressed_bytes: int
    floor: float
    device: str
    versions: dict[str, str]
    date: str
    hosts: tuple[float, float] | None = None
    compile_seconds: tuple[float, float] | None = None

    @property
    def ratio(self) -> float:
        """Dense time over compressed time."""
        return self.dense.median / self.compressed.median

    def content(self) -> dict:
        """What a file keeps of it."""
        return asdict(self) | {"ratio": self.ratio}

    @classmethod
    def of(cls, content: dict) -> "Row":
        """The row that `content` was made from.

        Raises:
            KeyError, TypeError, ValueError: it is no content of a row.
        """
        known = {field.name: content[field.name] for field in fields(cls)}
        case = Case(**known["case"] | {"shape": Shape(**known["case"]["shape"])})
        samples = {name: Sample(**known[name]) for name in ("dense", "compressed")}
        return cls(**known | samples | {"case": case})


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        return [Row.of(content) for content in json.loads(path.read_text())["rows"]]
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; `bench --suite --json {path}` writes one"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no rows that `bench --json` wrote: {error!r}") from error


def write(path: Path, rows: Iterable[Row]) -> None:
    """Put rows into a file; those of another case or device that it holds stay."""
    kept = {(row.device, row.case): row for row in (read(path) if path.exists() else ())}
    kept |= {(row.device, row.case): row for row in rows}
    path.write_text(json.dumps({"rows": [row.content() for row in kept.values()]}, indent=1) + "\n")


def table(rows: list[Row], style: str) -> str:
    """The rows in a table for each task."""
    parts = []
    for task, title in TITLES.items():
        chosen = [row for row in rows if row.case.task == task]
        if chosen:
            parts.append(f"{title}\n\n{_task_table(chosen, style)}")
    return "\n\n".join(parts)


def _task_table(rows: list[Row], style: str) -> str:
    headers = ["shape", "keys / values", "dense ms", "by", "this ms", "quartiles", "dense / this", "floor %", "MiB"]
    headers += ["dense MiB", "host ms, dense", "host ms, this", "compile s"] if rows[0].case.task == "step" else []
    formats = ["", "", ".4f", "", ".4f", "", ".2f", ".0f", ".1f", ".1f", ".2f", ".2f", ""]
    lines, last = [], None
    for row in rows:
        quartiles = f"{row.compressed.low:.4f} - {row.compressed.high:.4f}"
        title, last = ("" if row.case.title == last else row.case.title), row.case.title
        line = [title, row.case.pair, row.dense.median, row.rival, row.compressed.median, quartiles]
        line += [row.ratio, 100 * row.floor, row.compressed_bytes / 2**20]
        if row.case.task == "step":
            compiling = " and ".join(f"{seconds:.0f}" for seconds in row.compile_seconds or ())
            line += [row.dense_bytes / 2**20, *(row.hosts or (None, None)), compiling]
        lines.append(line)
    return tabulate(lines, headers, tablefmt=style, floatfmt=formats[: len(headers)])


def streams(rows: list[Row], layers: int, free: int, weights: int, style: str) -> str:
    """How many sequences fit beside the weights, from the bytes of the caches that were measured."""
    lines = {}
    for row in rows:
        if row.case.task in ("attend", "step"):
            # The caches of a step are those of all layers; attention was given one layer's.
            times = 1 if row.case.task == "step" else layers
            each = [times * size / row.case.shape.batch for size in (row.dense_bytes, row.compressed_bytes)]
            fit = [int(max(0, free - weights) // size) for size in each]
            shape = replace(row.case.shape, queries=1)
            lines[shape, row.case.pair] = (
                *(str(shape), row.case.pair),
                *(each[0] / 2**20, each[1] / 2**20, *fit),
            )
    headers = ("shape", "keys / values", "dense MiB a stream", "this MiB a stream", "dense streams", "these streams")
    title = f"streams that fit: {layers} layers, {free / 2**30:.1f} GiB free, {weights / 2**30:.1f} GiB of weights"
    return f"{title}\n\n{tabulate(lines.values(), headers, tablefmt=style, floatfmt=('', '', '.1f', '.1f', '', ''))}"


def require_device(rows: Iterable[Row], name: str, path: Path) -> None:
    """Raise ValueError where a row was measured on another kind of device."""
    for row in rows:
        if row.device != name:
            raise ValueError(
                f"--check {path}: {row.case.task} of {row.case.title} was measured on {row.device!r} and this is "
                f"{name!r}; ratios compare on one kind of device only"
            )


def compare(old: list[Row], new: list[Row], tolerance: float, style: str) -> tuple[str, list[Row]]:
    """A table of old and new ratios, and the rows whose ratio fell by more than `tolerance` percent."""
    before = {row.case: row for row in old}
    slower = [row for row in new if row.ratio < before[row.case].ratio * (1 - tolerance / 100)]
    lines = [
        (
            *(row.case.task, row.case.title, row.case.pair, before[row.case].ratio, row.ratio),
            100 * (row.ratio / before[row.case].ratio - 1),
            "slower" if row in slower else "",
        )
        for row in new
    ]
    headers = ("task", "shape", "keys / values", "old ratio", "new ratio", "change %", "")
    return tabulate(lines, headers, tablefmt=style, floatfmt=("", "", "", ".3f", ".3f", "+.1f", "")), slower
