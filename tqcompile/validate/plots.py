"""The plots of a result: bits against divergence, intervals, the needle's grids, and damage by layer."""

from collections.abc import Iterator

from tqcompile.validate.result import Result, Row

SAFE, UNSAFE, NEUTRAL = "#2f7d6d", "#c0504d", "#9aa5b1"


def figures(result: Result) -> Iterator[tuple[str, object]]:
    """A heading and a figure of each plot that the result has something for."""
    rows = [row for row in result.rows if row.quality is not None and not row.trouble]
    if not rows:
        return
    colors = {row.name: UNSAFE if result.failures[row.name] else SAFE for row in rows}
    yield "bits against mean KL", _frontier(rows, colors)
    yield "increase of perplexity, 95 % intervals", _intervals(rows, colors)
    if result.dense.needle:
        yield "needle in a haystack", _grids([result.dense, *rows])
    yield "damage by layer", _layers(rows)


def _axes(width: float, height: float, *grid: int, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*grid, **options)


def _frontier(rows: list[Row], colors: dict[str, str]):
    figure, axes = _axes(8, 4.5)
    for row in rows:
        axes.plot(row.size.bits, row.quality.kl, "o", color=colors[row.name])
        place = (row.size.bits, row.quality.kl)
        axes.annotate(row.name, place, textcoords="offset points", xytext=(6, 4), fontsize=9)
    # What is exactly dense has no place on a logarithmic axis: near zero this one is linear.
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    axes.set(xlabel="bits of a number of the cache, scales included", ylabel="mean KL to dense, nats a token")
    axes.grid(True, alpha=0.3)
    return figure


def _intervals(rows: list[Row], colors: dict[str, str]):
    figure, axes = _axes(8, 1 + 0.4 * len(rows))
    for at, row in enumerate(rows):
        increase = row.quality.increase
        sides = [[100 * (increase.mean - increase.low)], [100 * (increase.high - increase.mean)]]
        axes.errorbar([100 * increase.mean], [at], xerr=sides, fmt="o", capsize=4, color=colors[row.name])
    axes.axvline(0, color=NEUTRAL, linewidth=1)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("increase of perplexity over dense, per cent")
    axes.grid(True, axis="x", alpha=0.3)
    return figure


def _grids(rows: list[Row]):
    depths = list(dict.fromkeys(cell.depth for cell in rows[0].needle))
    lengths = list(dict.fromkeys(cell.length for cell in rows[0].needle))
    across = min(3, len(rows))
    down = -(-len(rows) // across)
    figure, axes = _axes(4 * across, 1.2 + 2.4 * down, down, across, squeeze=False)
    low = min(cell.logprob for row in rows for cell in row.needle)
    for place, row in zip(axes.flat, rows):
        values = {(cell.depth, cell.length): cell for cell in row.needle}
        grid = [[values[depth, length].logprob for length in lengths] for depth in depths]
        image = place.imshow(grid, vmin=min(low, -0.1), vmax=0, cmap="viridis", aspect="auto")
        for (depth, length), cell in values.items():
            if not cell.found:
                color = "black" if cell.logprob > low / 2 else "white"
                place.text(lengths.index(length), depths.index(depth), "lost", ha="center", va="center", color=color)
        place.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        place.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        place.set_title(f"{row.name}: {row.found} of {len(row.needle)}", fontsize=10)
    for place in axes.flat[len(rows) :]:
        place.set_axis_off()
    figure.supxlabel("tokens of the prompt")
    figure.supylabel("depth")
    figure.colorbar(image, ax=axes, label="mean log-probability of an answer's token")
    return figure


def _layers(rows: list[Row]):
    figure, axes = _axes(10, 4, 1, 2, sharey=True)
    for place, side in zip(axes, ("keys", "values")):
        for row in rows:
            damage = getattr(row, f"damage_{side}")
            place.plot(range(len(damage)), damage, "o-", markersize=3, linewidth=1, label=row.name)
        place.set_yscale("symlog", linthresh=1e-6)
        place.set(title=side, xlabel="layer")
        place.grid(True, alpha=0.3)
    axes[0].set(ylabel="squared error over squared length", ylim=(0, None))
    axes[1].legend(fontsize=8)
    return figure
