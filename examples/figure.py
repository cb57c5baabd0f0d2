"""docs/quality.svg: what a token takes with each pair of codecs, and what that costs, from docs/quality.json.

python examples/quality.py --write docs/quality.json && python examples/figure.py
"""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
SOURCE, TARGET = DOCS / "quality.json", DOCS / "quality.svg"

WIDTH, TOP, ROW, BAR, LEFT, SPAN = 860, 76, 30, 18, 220, 300
INK, GREY, DENSE, OURS = "#1f2933", "#6b7785", "#c3ccd6", "#2f7d6d"
STYLE = "font-family='Helvetica,Arial,sans-serif'"


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "start", weight="400") -> str:
    """One line of text."""
    return (
        f"<text x='{x:.0f}' y='{y:.0f}' {STYLE} font-size='{size}' font-weight='{weight}' "
        f"fill='{colour}' text-anchor='{anchor}'>{words}</text>"
    )


def bar(y: float, share: float, colour: str) -> str:
    """A bar whose length is a share of the dense cache."""
    return f"<rect x='{LEFT}' y='{y:.0f}' width='{SPAN * share:.1f}' height='{BAR}' rx='2' fill='{colour}'/>"


def line(index: int, label: str, share: float, colour: str, notes: tuple[str, str, str]) -> list[str]:
    """One row: the pair, its bar, and three figures."""
    y = TOP + index * ROW
    columns = zip((LEFT + SPAN + 70, LEFT + SPAN + 170, LEFT + SPAN + 260), notes)
    weight = "700" if colour == OURS and notes[0].endswith("*") else "400"
    return [
        text(LEFT - 12, y + 14, label, anchor="end", weight=weight),
        bar(y, share, colour),
        *(text(x, y + 14, note.rstrip("*"), anchor="end", weight=weight) for x, note in columns),
    ]


def draw(content: dict, chosen: str) -> str:
    """The figure as SVG; the row of the pair `chosen` is set in bold."""
    dense = content["dense_bytes_per_token"]
    rows = [row for row in content["rows"] if row["bytes_per_token"] <= dense]
    parts = [
        text(20, 28, "KV cache of SmolLM2-135M-Instruct: bytes a token takes, and what that costs", 16, weight="700"),
        text(LEFT - 12, 60, "keys / values", 12, GREY, "end"),
        text(LEFT, 60, f"bytes a token (dense float16: {dense:,})", 12, GREY),
        *(
            text(LEFT + SPAN + x, 60, name, 12, GREY, "end")
            for x, name in ((70, "bytes"), (170, "mean KL"), (260, "top-1"))
        ),
        *line(0, "dense float16", 1.0, DENSE, (f"{dense:,}", "0", "100 %")),
    ]
    for index, row in enumerate(sorted(rows, key=lambda row: -row["bytes_per_token"]), start=1):
        mark = "*" if row["pair"] == chosen else ""
        notes = (f"{row['bytes_per_token']:,.0f}{mark}", f"{row['kl']:.4f}", f"{100 * row['top1']:.1f} %")
        parts += line(index, row["pair"].replace("/", " / "), row["bytes_per_token"] / dense, OURS, notes)
    height = TOP + (len(rows) + 1) * ROW + 34
    foot = f"{content['setting']}, {content['date']}. Bold: the default."
    parts.append(text(20, height - 14, foot, 12, GREY))
    body = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
        f"viewBox='0 0 {WIDTH} {height}'>\n<rect width='100%' height='100%' fill='#ffffff'/>\n{body}\n</svg>\n"
    )


def main() -> None:
    """Read the figures, write the drawing."""
    from tqcompile import formats

    content = json.loads(SOURCE.read_text())
    TARGET.write_text(draw(content, "/".join(formats.PRESETS["balanced"])))
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
