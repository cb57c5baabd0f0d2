"""The tables of a result, as headers and rows of cells: for the terminal and the page alike."""

from tqcompile.explain.tables import Table
from tqcompile.validate.result import Result, Row
from tqcompile.validate.verdict import interval, mean_score


def tables(result: Result) -> list[Table]:
    """Every table that has something to show."""
    found = [_costs(result), _more(result), _needles(result), _tasks(result), _layers(result), _trouble(result)]
    return [table for table in found if table is not None]


def _measured(result: Result) -> list[Row]:
    return [row for row in (result.dense, *result.rows) if row.quality is not None and not row.trouble]


def _costs(result: Result) -> Table:
    headers = (
        "codecs",
        "bits",
        "live bytes",
        "smaller",
        "mean KL",
        "99 % KL",
        "top-1",
        "perplexity",
        "increase",
        "safe",
    )
    dense, rows = result.dense, []
    for row in _measured(result):
        quality, size = row.quality, row.size
        cells = [row.name, f"{size.bits:.2f}", f"{size.live_bytes:,}"]
        if row is dense:
            cells += ["", "", "", "", f"{quality.perplexity:.3f}", "", ""]
        else:
            cells += [f"{dense.size.live_bytes / size.live_bytes:.2f} x", f"{quality.kl:.4f}", f"{quality.kl99:.3f}"]
            cells += [f"{quality.top1:.1%}", f"{quality.perplexity:.3f}", interval(row)]
            cells.append("no" if result.failures[row.name] else "yes")
        rows.append(tuple(cells))
    return Table("what each costs", headers, tuple(rows), numbers=9)


def _more(result: Result) -> Table | None:
    """Which codecs they are, and what is no mean over tokens."""
    rows = [row for row in _measured(result) if row is not result.dense]
    headers, cells = ["codecs", "keys", "values"], [[row.name, row.keys, row.values] for row in rows]
    if any(row.extras for row in rows):
        headers.append("beside codes")
        cells = [[*line, row.extras] for row, line in zip(rows, cells)]
    words = len(headers)
    headers += ["damage of K", "damage of V"]
    cells = [[*line, _mean(row.damage_keys), _mean(row.damage_values)] for row, line in zip(rows, cells)]
    for name, shown in (("greedy", _greedy), ("needles", lambda row: f"{row.found} of {len(row.needle)}")):
        if getattr(result.dense, {"needles": "needle"}.get(name, name)):
            headers.append(f"{name} (dense {shown(result.dense)})" if name == "needles" else name)
            for row, line in zip(rows, cells):
                line.append(shown(row))
    return Table("what they are and do", tuple(headers), tuple(map(tuple, cells)), numbers=len(headers) - words)


def _greedy(row: Row) -> str:
    counts = sorted(row.greedy)
    return f"{sum(counts) / len(counts):.1f} ({counts[0]} to {counts[-1]})"


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2e}" if values else ""


def _needles(result: Result) -> Table | None:
    if not result.dense.needle:
        return None
    depths = list(dict.fromkeys(cell.depth for cell in result.dense.needle))
    lengths = list(dict.fromkeys(cell.length for cell in result.dense.needle))
    rows = []
    for row in _measured(result):
        for length in lengths:
            cells = [cell for cell in row.needle if cell.length == length]
            rows.append((row.name, f"{length:,}", *(f"{'' if c.found else 'lost '}{c.logprob:.2f}" for c in cells)))
    headers = ("codecs", "tokens", *(f"depth {depth:.0%}" for depth in depths))
    note = "Mean log-probability of a token of the answer, in nats; lost where one of them was not the likeliest."
    return Table("needle in a haystack", headers, tuple(rows), (note,), numbers=1 + len(depths))


def _tasks(result: Result) -> Table | None:
    if not result.dense.answers:
        return None
    headers = ("codecs", *result.dense.tasks, "mean")
    rows = tuple(
        (row.name, *(f"{score:.1f}" for score in row.tasks.values()), f"{mean_score(row):.1f}")
        for row in _measured(result)
    )
    return Table("tasks, of 100", headers, rows, numbers=len(headers) - 1)


def _layers(result: Result) -> Table | None:
    """The worst layers of each: all of them are on the page and in the JSON."""
    rows = []
    for row in _measured(result):
        for what, values in (("keys", row.damage_keys), ("values", row.damage_values)):
            if values:
                worst = sorted(range(len(values)), key=lambda at: -values[at])[:3]
                said = ", ".join(f"{at}: {values[at]:.2e}" for at in worst)
                rows.append((row.name, what, said, f"{sorted(values)[len(values) // 2]:.2e}"))
    if not rows:
        return None
    return Table("damage by layer", ("codecs", "of", "worst layers", "median"), tuple(rows), numbers=1)


def _trouble(result: Result) -> Table | None:
    rows = [(row.name, "stopped", row.trouble) for row in result.rows if row.trouble]
    rows += [(row.name, "stayed dense", said) for row in result.rows for said in row.dense_caches]
    rows += [(row.name, "decoded", said) for row in result.rows for said in row.decoded]
    return Table("what went otherwise", ("codecs", "what", "which"), tuple(rows)) if rows else None
