"""Bits against KL for every way to keep a cache that is proposed here or elsewhere, by fake quantisation.

    python examples/frontier.py [--model FOLDER] [--device cuda] [--write F.json] [--plot F.svg]

All layers, every byte of metadata counted, the same windows of English for all. The first quarter of the text is for
calibration (programs are, for another), on the second our own candidate for each budget is chosen, and all figures
shown are of the second half.
`main` reads windows of 1,024 tokens, `long` scores the last quarter of 4,096, `bias` gives the keys large biases.
"""

import argparse
import inspect
import json
import statistics
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch
import transformers
from simulation.attention import Simulation, System, reference
from simulation.layers import ByLayer
from simulation.systems import BUDGETS, biased, systems
from simulation.transforms import Moments, gather
from smollm2 import device, english, load, positive
from tabulate import tabulate
from tqdm import tqdm

SEEDS = (2504_19874, 11, 23, 37, 59)
TUNING_SEED = 101
PROMPT = 128
PARTS = ("main", "long", "bias")
# How bits are counted where a model keeps tables of its own: by their column, and what is said of it.
COUNTED = {"bits_alone": "", "bits": ", tables of a calibration shared by many sequences"}
# The systems that the bars are measured against.
BOUNDS = ("q4_0+Hadamard", "4/4", "3/3")
BIAS_NORM = 300.0


def windows_of(ids: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`count` windows [count, length] spread evenly over ids [T].

    Raises:
        SystemExit: they would overlap.
    """
    if count * length > len(ids):
        raise SystemExit(f"{count} windows of {length} tokens are more than the {len(ids)} there are. Ask for fewer")
    stride = (len(ids) - length) // max(count - 1, 1)
    return torch.stack([ids[start : start + length] for start in range(0, stride * count, stride)][:count])


def source_code(tokenizer) -> torch.Tensor:
    """Token ids [T] of Python programs: calibration on a text unlike the one that is read."""
    text = "\n\n".join(inspect.getsource(module) for module in (argparse, inspect, statistics))
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def measure(
    simulation: Simulation, windows: torch.Tensor, keep: int, chosen: list, seeds: tuple[int, ...], title: str
) -> list[dict]:
    """A row for each system: means over windows [N, T] and seeds, scored at the last `keep` positions of each."""
    contexts = torch.arange(windows.shape[1] - keep, windows.shape[1], dtype=torch.float64) + 1
    # Bits an element for each byte that a model keeps once, charged to one sequence as if it were alone.
    alone = (8 / (simulation.elements * contexts)).mean().item()
    found: dict[str, list[dict]] = defaultdict(list)
    runs = [(system, seed) for system in chosen for seed in (seeds if system.seeded else seeds[:1])]
    with tqdm(total=len(runs) * len(windows), desc=title, unit="run", smoothing=0) as bar:
        for window in windows:
            dense = reference(simulation, window, keep)
            for system, seed in runs:
                made = system.made(simulation, window, seed) if isinstance(system, ByLayer) else system
                figures = dense.compare(simulation.logits(window, keep, made, seed))
                bits = made.bits(contexts, simulation.layers, simulation.head_dim)
                found[system.name].append({**figures, "loss": figures["loss"] - dense.loss, "bits": bits, "seed": seed})
                bar.update()
    return [row(system, found[system.name], alone) for system in chosen]


def row(system: System | ByLayer, runs: list[dict], alone: float) -> dict:
    """Means over runs. `alone`: bits for each byte of tables, where one sequence pays for them.

    `spread` is the standard deviation over seeds of the mean KL over windows.
    """
    by_seed = defaultdict(list)
    for run in runs:
        by_seed[run["seed"]].append(run["kl"])
    constants = 0 if isinstance(system, ByLayer) else system.constants
    bits = statistics.mean(run["bits"] for run in runs)
    means = [statistics.mean(kl) for kl in by_seed.values()]
    return {
        "system": system.name,
        "rival": system.rival,
        "constants": constants,
        "bits": bits,
        "bits_alone": bits + constants * alone,
        "kl": statistics.mean(run["kl"] for run in runs),
        "spread": statistics.stdev(means) if len(means) > 1 else 0.0,
        "top1": statistics.mean(run["top1"] for run in runs),
        "perplexity": float(torch.tensor(statistics.mean(run["loss"] for run in runs)).exp()) - 1,
    }


def choose(rows: list[dict], budget: float, bits: str) -> str | None:
    """The system of ours with the least KL within a budget of `bits`, a column; None where none fits."""
    fitting = [row for row in rows if not row["rival"] and row[bits] <= budget]
    return min(fitting, key=lambda row: row["kl"])["system"] if fitting else None


def table(rows: list[dict]) -> str:
    """Rows for people, by bits."""
    body = [
        (
            row["system"],
            "rival" if row["rival"] else "",
            f"{row['bits']:.3f}",
            f"{row['bits_alone']:.3f}",
            f"{row['kl']:.5f}",
            f"{row['spread']:.5f}",
            f"{row['top1']:.1%}",
            f"{row['perplexity']:+.2%}",
        )
        for row in sorted(rows, key=lambda row: row["bits"])
    ]
    headers = ("system", "", "bits", "with a model's tables", "mean KL", "over seeds", "top-1", "perplexity")
    return tabulate(body, headers, tablefmt="github", colalign=("left", "left") + ("right",) * 6, disable_numparse=True)


def bars(parts: dict[str, dict]) -> list[tuple[str, str, str, str]]:
    """What the bars ask, our figure, the bound, and whether it is met; for the parts that were run."""
    lines = []
    main, long, bias = (parts.get(name) for name in ("main", "long", "bias"))
    for part, budget, factor, rival, text in (
        (main, "4.3", 0.6, "q4_0+Hadamard", "0.6 of rotated q4_0"),
        (main, "3.3", 1.0, "4/4", "plain TurboQuant 4/4"),
        (long, "2.5", 0.5, "3/3", "half of plain TurboQuant 3/3, 4K context"),
    ):
        if part is None:
            continue
        rows = {row["system"]: row for row in part["rows"]}
        bound = factor * rows[rival]["kl"]
        for bits, said in COUNTED.items():
            name = part["chosen"][bits].get(budget)
            ours = rows[name] if name else None
            figure = f"{ours['kl']:.5f} at {ours[bits]:.3f} bits: {name}" if ours else "no candidate"
            met = yes(ours and ours["kl"] <= bound)
            lines.append((f"<= {budget} bits{said}: {text}", figure, f"{bound:.5f}", met))
    if bias is not None:
        kl = {row["system"]: row["kl"] for row in bias["rows"]}
        for name in (one for one in biased() if one.centre):
            ours, bound = kl[f"{name.name}, biased"], 1.5 * kl[name.name]
            text = f"key biases, 1.5 of unmodified: {name.name}"
            lines.append((text, f"{ours:.5f}", f"{bound:.5f}", yes(ours <= bound)))
    return lines


def yes(met: bool | None) -> str:
    return "met" if met else "NOT met"


def plot(parts: dict[str, dict], path: Path) -> None:
    """The frontier of each part: bits against KL, both axes logarithmic."""
    from matplotlib import pyplot

    drawn = {name: part for name, part in parts.items() if name != "bias"}
    figure, grid = pyplot.subplots(1, len(drawn), figsize=(9 * len(drawn), 6.5), layout="constrained", squeeze=False)
    for axes, (name, part) in zip(grid[0], drawn.items()):
        axes.set(xscale="log", yscale="log", xlabel="bits an element, all metadata", ylabel="mean KL (nats a token)")
        for rival, colour, label in ((True, "#b4553a", "rivals"), (False, "#2f7d6d", "ours")):
            rows = sorted((row for row in part["rows"] if row["rival"] == rival), key=lambda row: row["bits"])
            axes.plot([row["bits"] for row in rows], [row["kl"] for row in rows], "o", color=colour, label=label)
            least = float("inf")
            for row in rows:
                if row["kl"] < least:
                    least = row["kl"]
                    axes.annotate(row["system"], (row["bits"], row["kl"]), fontsize=6, rotation=20)
        ticks = (2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_title(f"{name}: {part['setting']}", fontsize=9)
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.savefig(path)


def run_part(
    name: str,
    simulation: Simulation,
    moments: dict[str, list[Moments]],
    texts: tuple[torch.Tensor, torch.Tensor],
    options,
) -> dict:
    """Choose on the first of two texts, measure on the second."""
    length, keep, count = {
        "main": (options.length, options.length - PROMPT, options.windows),
        "long": (options.long_length, options.long_length // 4, options.long_windows),
        "bias": (options.length, options.length - PROMPT, options.windows),
    }[name]
    seeds = SEEDS[: options.seeds]
    setting = f"{count} windows of {length} tokens, last {keep} scored, {len(seeds)} seeds"
    windows = windows_of(texts[1], count, length)
    if name == "bias":
        rows = measure(simulation, windows, keep, biased(), seeds, "no biases")
        before = [simulation.logits(window, keep) for window in windows]
        simulation.bias_keys(BIAS_NORM)
        dense = [reference(simulation, window, keep) for window in windows]
        kl = statistics.mean(now.compare(then)["kl"] for now, then in zip(dense, before))
        setting += f"; biases of norm {BIAS_NORM:.0f}, dense KL to the unmodified model {kl:.5f}"
        with_bias = measure(simulation, windows, keep, biased(), seeds, "biases")
        rows += [{**row, "system": f"{row['system']}, biased"} for row in with_bias]
        return {"setting": setting, "rows": rows, "chosen": {}}
    listed = [
        system
        for system in systems(name, moments)
        if not options.only or system.name in BOUNDS or any(text in system.name for text in options.only)
    ]
    tuned = measure(
        simulation,
        windows_of(texts[0], options.tuning_windows, length),
        keep,
        [system for system in listed if not system.rival],
        (TUNING_SEED,),
        f"{name}, choose",
    )
    return {
        "setting": setting,
        "chosen": {bits: {str(budget): choose(tuned, budget, bits) for budget in BUDGETS} for bits in COUNTED},
        "rows": measure(simulation, windows, keep, listed, seeds, name),
        "tuning": tuned,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the parts, print a table each, and the bars of all parts in the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, with safetensors or a .gguf file (default: packaged SmolLM2)")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--windows", type=positive, default=8, help="reported windows (default 8)")
    parser.add_argument("--length", type=positive, default=1024, help="tokens in a window (default 1024)")
    parser.add_argument("--long-windows", type=positive, default=8, help="long windows (default 8)")
    parser.add_argument("--long-length", type=positive, default=4096, help="tokens in a long one (default 4096)")
    parser.add_argument("--tuning-windows", type=positive, default=4, help="to choose on, of another text (default 4)")
    parser.add_argument("--calibration-windows", type=positive, default=16, help="of a third text (default 16)")
    parser.add_argument("--seeds", type=positive, default=3, help=f"rotations (default 3, at most {len(SEEDS)})")
    parser.add_argument("--only", nargs="+", help="only systems whose name contains one of these")
    parser.add_argument("--write", type=Path, help="JSON file; parts that were not run now stay in it")
    parser.add_argument("--plot", type=Path, help="drawing of the frontier (.svg, .png)")
    options = parser.parse_args(argv)
    if options.seeds > len(SEEDS):
        parser.error(f"--seeds {options.seeds}: there are {len(SEEDS)}")
    model, tokenizer = load(options.model, options.device)
    ids = english(tokenizer)[0].to(options.device)
    calibration, choosing, reported = ids.tensor_split([len(ids) // 4, len(ids) // 2])
    simulation = Simulation(model, PROMPT)
    moments = {
        kind: gather(simulation, windows_of(text.to(options.device), options.calibration_windows, options.length))
        for kind, text in (("text", calibration), ("code", source_code(tokenizer)))
    }
    written = json.loads(options.write.read_text()) if options.write and options.write.exists() else {}
    parts = written.get("parts", {})
    # The last part leaves its biases in the model.
    for name in sorted(options.parts, key=PARTS.index):
        parts[name] = run_part(name, simulation, moments, (choosing, reported), options)
        print(f"\n{name}: {parts[name]['setting']}\n\n{table(parts[name]['rows'])}\n")
        if options.write:
            versions = {"torch": torch.__version__, "transformers": transformers.__version__, "date": str(date.today())}
            options.write.write_text(json.dumps({"versions": versions, "parts": parts}, indent=1) + "\n")
    headers = ("bar: mean KL at most", "figure", "bound", "")
    print(f"\n{tabulate(bars(parts), headers, tablefmt='github', disable_numparse=True)}")
    if options.plot:
        plot(parts, options.plot)


if __name__ == "__main__":
    main()
