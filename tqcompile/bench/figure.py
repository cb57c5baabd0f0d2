"""Time of attention against the length of the context: dense beside compressed, and the floor as a line."""

from pathlib import Path

from tqcompile.bench.rows import Row


def require_drawable(path: Path) -> None:
    """Raise ValueError where a figure cannot be written to `path`, before anything is measured for it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot draws with matplotlib, which is not installed: pip install matplotlib") from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise ValueError(f"--plot {path}: the ending is no format of a figure; use one of {', '.join(sorted(known))}")


def draw(rows: list[Row], path: Path) -> None:
    """Write the figure of the rows of attention, which are of one codec pair and differ in context."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in rows if row.case.task == "attend"), key=lambda row: row.case.shape.context)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    contexts = [row.case.shape.context for row in rows]
    for name, samples, color in (
        ("dense", [row.dense for row in rows], "#9aa5b1"),
        (rows[0].case.pair, [row.compressed for row in rows], "#2f7d6d"),
    ):
        middle = [sample.median for sample in samples]
        spread = [
            [sample.median - sample.low for sample in samples],
            [sample.high - sample.median for sample in samples],
        ]
        axes.errorbar(contexts, middle, yerr=spread, fmt="o-", color=color, capsize=3, label=name)
    floor = [row.floor * row.compressed.median for row in rows]
    axes.plot(contexts, floor, "--", color="#2f7d6d", label="floor: its bytes at the speed of a copy")
    axes.set_xscale("log", base=2)
    queries = rows[0].case.shape.queries
    asked = "one query" if queries == 1 else f"{queries} queries"
    axes.set(yscale="log", xlabel="tokens of context", ylabel=f"attention of {asked}, ms (quartiles as bars)")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.set_title(
        f"{rows[0].device}: batch {rows[0].case.shape.batch}, {rows[0].case.shape.heads} heads over "
        f"{rows[0].case.shape.kv_heads}, {rows[0].case.shape.head_dim} dims",
        fontsize=10,
    )
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path)
