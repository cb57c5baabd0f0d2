"""docs/quality.svg: what each pair of codecs takes and what it costs, drawn from docs/quality.json.

python examples/quality.py --write docs/quality.json && python examples/figure.py
"""

import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from tqcompile import formats

DOCS = Path(__file__).resolve().parent.parent / "docs"
SOURCE, TARGET = DOCS / "quality.json", DOCS / "quality.svg"
DENSE_BITS = 16


def draw(content: dict, chosen: dict[str, str]) -> pyplot.Figure:
    """Mean KL against bits an element; the pairs in `chosen` carry the name of their preset."""
    rows = [row for row in content["rows"] if row["bits"] < DENSE_BITS]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel="bits an element of the KV cache, scales included")
    axes.set_ylabel("mean KL to the dense model (nats a token)")
    for row in rows:
        name = row["pair"].replace("turboquant:", "").replace("/", " / ")
        preset = chosen.get(row["pair"])
        if preset:
            label = f"{name} ({preset}): {DENSE_BITS / row['bits']:.1f} x smaller, top-1 {row['top1']:.0%}"
            style, place = {"color": "#2f7d6d", "markersize": 9}, {"xytext": (-8, -5), "ha": "right"}
        else:
            label, style, place = name, {"color": "#9aa5b1", "markersize": 6}, {"xytext": (7, -3), "ha": "left"}
        axes.plot(row["bits"], row["kl"], "o", **style)
        axes.annotate(label, (row["bits"], row["kl"]), textcoords="offset points", fontsize=9, **place)
    ticks = (2, 3, 4, 5, 6, 8, 10)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(1.4, 11)
    axes.grid(True, alpha=0.3)
    axes.set_title(f"SmolLM2-135M-Instruct, keys / values in turboquant bits\n{content['setting']}", fontsize=10)
    return figure


def main() -> None:
    """Read the figures, write the drawing."""
    # Text as text and a fixed salt: the same figures make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tqcompile"})
    chosen = {"/".join(preset.pair): name for name, preset in formats.PRESETS.items() if not preset.extras}
    figure = draw(json.loads(SOURCE.read_text()), chosen)
    figure.savefig(TARGET, metadata={"Date": None})
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
