"""What each preset costs, and the bars that they are held to, through the backend.

    python examples/presets.py [--model FOLDER] [--part table short long bias] [--device cuda] [--json FILE]

`table`: bits, bytes a token of the shape of Llama 3 8B, and what is lost on a real model, for every preset.
`short`, `long` and `bias`: over three rotation seeds, what codecs with centring, a first token and a window kept
exactly are held to: against rotated q4_0 and plain TurboQuant in short and in long windows, and against themselves
where keys have large biases. Rivals that the backend has no codec for are in `frontier.py`.

The text is the second half of the topics of Python's help: choices were made on the first. Each window is read to its
last quarter (of 1,024 tokens, to its last 896) in one call and then a few tokens at a time, as a generation reads it.
Bits are those of all bytes that a cache holds at the end of a window, spare room left out; tokens that are kept exactly
are in the model's dtype. Dense is measured first, in the same run.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import torch
from simulation.attention import Simulation
from smollm2 import device, load, positive
from tabulate import tabulate
from tqdm import tqdm

from tqcompile import formats, tables, turboquant
from tqcompile.bench.compressed import live_bytes
from tqcompile.options import INNERS
from tqcompile.validate import Settings, text
from tqcompile.validate.choice import Choice, choice
from tqcompile.validate.measure import Exact, Measure, Plan
from tqcompile.validate.reading import Reading
from tqcompile.validate.result import DENSE, Row

SEEDS = (tables.ROTATION_SEED, 11, 23)
LAYERS, KV_HEADS, HEAD_DIM, DENSE_BYTES = 32, 8, 128, 131072
BIAS_NORM = 300.0
ROTATED_Q4, PLAIN_4, PLAIN_3 = "q4_0:hadamard", "turboquant:4", "turboquant:3"
LOSSLESS = "lossless"
BIASED = ("turboquant:4+centre", "turboquant:4+centre+sinks=1")
SHORT = {
    "<= 4.3 bits: 0.6 of rotated q4_0": (4.3, "turboquant:4+centre+sinks=1", ROTATED_Q4, 0.6),
    "<= 3.3 bits: plain TurboQuant 4/4": (3.3, "turboquant:3/turboquant:2+centre+sinks=1+window=16", PLAIN_4, 1.0),
}
LONG = {
    "<= 2.5 bits: half of plain TurboQuant 3/3, 4K": (2.5, "turboquant:2+centre+sinks=1+window=32", PLAIN_3, 0.5),
}


@contextmanager
def rotation_of(seed: int) -> Iterator[None]:
    """While this is open, codecs rotate by the matrices of another seed."""
    before = tables.BASES["rotation"]
    tables.BASES["rotation"] = lambda rows, columns: tables.rotation(columns, seed)
    try:
        _forget()
        yield
    finally:
        tables.BASES["rotation"] = before
        _forget()


def _forget() -> None:
    tables.basis_matrix.cache_clear()
    tables.overlap.cache_clear()


@dataclass(frozen=True)
class Measured:
    """Rows of a model and a text, by choice: one for each seed."""

    dense: Row
    rows: dict[str, list[Row]]


def measure(model, tokenizer, settings: Settings, names: Sequence[str], seeds: tuple[int, ...]) -> Measured:
    """Dense once, and each choice once for each seed; once where no matrix is random."""
    document = text.python_help()
    plan = Plan.of(model, tokenizer, document[len(document) // 2 :], settings)
    runs = [(choice(name), seed) for name in names for seed in (seeds if _is_random(choice(name)) else seeds[:1])]
    dense, rows = Row(DENSE), {name: [] for name in names}
    with TemporaryDirectory() as folder, tqdm(total=(1 + len(runs)) * plan.calls, unit="part", disable=None) as bar:
        exact = Exact(Path(folder))
        bar.set_postfix_str(DENSE)
        with Reading(model, settings.inner).open() as reading:
            Measure(reading, plan, dense, exact, bar).all()
        for chosen, seed in runs:
            bar.set_postfix_str(chosen.name)
            rows[chosen.name].append(Row.of(chosen))
            backend = turboquant(**dict(chosen.options), inner=settings.inner)
            with rotation_of(seed), Reading(model, backend).open() as reading:
                Measure(reading, plan, rows[chosen.name][-1], exact, bar).all()
    trouble = {row.name: row.dense_caches for found in rows.values() for row in found if row.dense_caches}
    if trouble:
        raise SystemExit(f"caches stayed dense, so that these figures would not be of codes: {trouble}")
    return Measured(dense, rows)


def _is_random(chosen: Choice) -> bool:
    codecs = map(formats.codec, chosen.preset.pair)
    return any(term.basis == "rotation" for codec in codecs for term in codec.terms)


def bytes_a_token(preset: formats.Preset, context: int) -> float:
    """Bytes of the live storages of one layer's cache of bfloat16 that the backend writes and reads, for each token of
    `context`, times the layers of Llama 3 8B."""
    size = 1, KV_HEADS, context, HEAD_DIM
    keys, values = (torch.randn(size, dtype=torch.bfloat16) for _ in range(2))
    new = torch.randn(1, KV_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16)
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(_step, backend=turboquant(**asdict(preset), inner="eager"))(
            new, torch.tensor([context - 1]), keys, values
        )
    return LAYERS * live_bytes([keys, values]) / context


def _step(new: torch.Tensor, position: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    keys.index_copy_(2, position, new)
    values.index_copy_(2, position, new)
    return torch.nn.functional.scaled_dot_product_attention(new, keys, values)


def table(model, tokenizer, given: argparse.Namespace) -> tuple[str, dict]:
    """A row for each preset, for people and for programs."""
    settings = Settings(
        context=given.context, prefill=given.context * 3 // 4, **_shared(given), generate=0, needle=not given.no_needle
    )
    found = measure(model, tokenizer, settings, given.presets, SEEDS[:1])
    lines, records = [], {"dense": found.dense.record()}
    for name in given.presets:
        preset, (row,) = formats.PRESETS[name], found.rows[name]
        size = bytes_a_token(preset, given.context)
        quality, needles = row.quality, f"{row.found} of {len(row.needle)}" if row.needle else ""
        change = f"{quality.increase.mean:+.2%} [{quality.increase.low:+.2%}, {quality.increase.high:+.2%}]"
        kept = f"`{preset.keys}`", f"`{preset.values}`", preset.extras
        figures = f"{row.size.bits:.2f}", f"{size:,.0f}", f"{DENSE_BYTES / size:.2f} x", f"{quality.kl:.4f}"
        lines.append((f"`{name}`", *kept, *figures, f"{quality.top1:.1%}", change, needles))
        records[name] = {**row.record(), "bytes_a_token": size}
    headers = ("preset", "keys", "values", "beside codes", "bits", "bytes a token", "smaller", "mean KL", "top-1")
    aligned = ("left",) * 4 + ("right",) * 7
    shown = tabulate(
        lines, (*headers, "perplexity", "needles"), "github", disable_numparse=True, colalign=aligned[: len(lines[0])]
    )
    return f"{shown}\n\n{_setting(settings, found)}", records


def _shared(given: argparse.Namespace) -> dict:
    return {"windows": given.windows, "batch": given.batch, "chunk": given.chunk, "inner": given.inner}


def _setting(settings: Settings, found: Measured) -> str:
    scored = settings.context - settings.prefill
    needles = f", needles {found.dense.found} of {len(found.dense.needle)}" if found.dense.needle else ""
    return (
        f"{settings.windows} windows of {settings.context:,} tokens, the last {scored:,} scored {settings.chunk} at a "
        f"time; dense: perplexity {found.dense.quality.perplexity:.3f}{needles}"
    )


def _bars(model, tokenizer, given: argparse.Namespace, length: int, prefill: int, wanted: dict) -> tuple[str, dict]:
    """What each bar asks, our figure and the rival's, and whether it is met."""
    settings = Settings(context=length, prefill=prefill, **_shared(given), generate=0)
    names = [name for _, ours, rival, _ in wanted.values() for name in (rival, ours)]
    found = measure(model, tokenizer, settings, names, SEEDS)
    lines = [
        _bar(title, found.rows[ours], most, rival, factor * _kl(found.rows[rival]))
        for title, (most, ours, rival, factor) in wanted.items()
    ]
    return f"{_shown(lines)}\n\n{_setting(settings, found)}", _records(found)


def short(model, tokenizer, given: argparse.Namespace) -> tuple[str, dict]:
    """The bars of windows of `--short` tokens, of which the first eighth is read in one call."""
    return _bars(model, tokenizer, given, given.short, given.short // 8, SHORT)


def long(model, tokenizer, given: argparse.Namespace) -> tuple[str, dict]:
    """The bar of windows of `--context` tokens, of which three quarters are read in one call."""
    return _bars(model, tokenizer, given, given.context, given.context * 3 // 4, LONG)


def bias(model, tokenizer, given: argparse.Namespace) -> tuple[str, dict]:
    """The bar of keys with large biases; the model has them afterwards no more than before."""
    settings = Settings(context=given.short, prefill=given.short // 8, **_shared(given), generate=0)
    unbiased = measure(model, tokenizer, settings, list(BIASED), SEEDS)
    projections = [module.k_proj for module in model.modules() if hasattr(module, "k_proj")]
    before, attention = [projection.bias for projection in projections], model.config._attn_implementation
    Simulation(model).bias_keys(BIAS_NORM)
    model.set_attn_implementation(attention)
    try:
        biased = measure(model, tokenizer, settings, [PLAIN_4, LOSSLESS, *BIASED], SEEDS)
    finally:
        for projection, old in zip(projections, before):
            projection.bias = old
    title = f"key biases of norm {BIAS_NORM:g}: 1.5 of unmodified"
    lines = [_bar(title, biased.rows[name], 16, name, 1.5 * _kl(unbiased.rows[name])) for name in BIASED]
    beside = {name: _kl(biased.rows[name]) for name in (PLAIN_4, LOSSLESS)}
    plain = f"the biased model with plain {PLAIN_4}: {beside[PLAIN_4]:.3f}, {LOSSLESS}: {beside[LOSSLESS]:.5f}"
    records = {"unbiased": _records(unbiased), "biased": _records(biased)}
    return f"{_shown(lines)}\n\n{plain}; {_setting(settings, biased)}", records


def _shown(lines: list[tuple]) -> str:
    headers = ("bar: mean KL at most", "figure", "over seeds", "bits", "bound", "")
    return tabulate(lines, headers, "github", disable_numparse=True)


def _records(found: Measured) -> dict:
    return {name: [row.record() for row in rows] for name, rows in (("dense", [found.dense]), *found.rows.items())}


def _bar(title: str, rows: list[Row], most: float, rival: str, bound: float) -> tuple:
    bits, spread = max(row.size.bits for row in rows), stdev(row.quality.kl for row in rows) if len(rows) > 1 else 0
    met = _kl(rows) <= bound and bits <= most
    figure = f"{_kl(rows):.5f} by {rows[0].name}"
    return title, figure, f"{spread:.5f}", f"{bits:.3f}", f"{bound:.5f} by {rival}", "met" if met else "NOT met"


def _kl(rows: list[Row]) -> float:
    return mean(row.quality.kl for row in rows)


PARTS = {"table": table, "short": short, "long": long, "bias": bias}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=tuple(PARTS))
    every = tuple(formats.PRESETS)
    parser.add_argument("--presets", nargs="+", choices=every, default=every, help="rows of the table (all)")
    for name, default, said in (
        ("context", 4096, "tokens of a window of the table, and of the last bar"),
        ("short", 1024, "tokens of a window of the other bars"),
        ("windows", 8, "windows"),
        ("batch", 8, "windows beside each other"),
        ("chunk", 4, "tokens of a scored call"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"{said} ({default})")
    parser.add_argument("--no-needle", action="store_true", help="leave the needles out")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--inner", choices=INNERS, default="eager", help="compiler of graphs (default eager)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure, for programs")
    given = parser.parse_args(arguments)
    model, tokenizer = load(given.model, given.device, getattr(torch, given.dtype))
    records = {}
    for part in dict.fromkeys(given.part):
        shown, records[part] = PARTS[part](model, tokenizer, given)
        print(shown + "\n", flush=True)
    if given.json:
        given.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
