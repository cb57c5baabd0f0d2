"""`python -m tqcompile bench`: times attention, scores, append, prefill and steps, dense and compressed, in one run.

A shape of your own:  python -m tqcompile bench --batch 8 --context 32768 --codec CODEC
A model's shape:      python -m tqcompile bench --model NAME --context 4096 16384 --plot times.svg
A regression guard:   python -m tqcompile bench --check docs/gpu.json
"""

import argparse
from pathlib import Path

from tqcompile import cpu, formats
from tqcompile.backend import compile_rows
from tqcompile.bench import clock, figure, request, rows
from tqcompile.bench.request import percent, size, tokens, whole
from tqcompile.bench.session import Session
from tqcompile.bench.shapes import DTYPES, MASKS, TASKS
from tqcompile.options import INNERS

NOTES = """\
dense: the fastest that runs, without a mask; buffers rotate through more than a cache holds; medians and quartiles.
attend and logits are over a rotated query, attend counts both kernels; append and prefill rotate what they encode; a
step counts everything. logits are over float32 unless --dtype says otherwise, and write float32.
floor: the bytes it must move at the speed of a copy ({speed:.3f} TB/s in this run), over its time."""


def add(commands) -> None:
    """Give the command its place among the others."""
    parser = commands.add_parser(
        "bench",
        help="time dense and compressed attention, scores, append, prefill and steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda options: run(options, parser))
    shape = parser.add_argument_group("the shape")
    shape.add_argument("--batch", type=whole, metavar="N", help="sequences (default 1)")
    shape.add_argument(
        "--context", type=tokens, nargs="+", metavar="N", help="tokens in each cache, as 4096 or 4K; one or more"
    )
    shape.add_argument("--heads", type=whole, metavar="N", help="query heads (default 32)")
    shape.add_argument("--kv-heads", type=whole, metavar="N", help="key and value heads (default 8)")
    shape.add_argument("--head-dim", type=whole, metavar="N", help="numbers of a head (default 128)")
    shape.add_argument("--layers", type=whole, metavar="N", help="layers of a step (default 32, on a CPU 2)")
    shape.add_argument(
        "--queries", type=whole, nargs="+", metavar="N", help="queries of each head in attention (default 1)"
    )
    shape.add_argument("--mask", choices=MASKS, help="mask of compressed attention (default none)")
    shape.add_argument(
        "--filled", type=tokens, metavar="N", help="tokens of a static cache that a mask shows attention (default all)"
    )
    shape.add_argument("--softcap", type=float, metavar="C", help="cap scores at C (default 0: they are not)")
    shape.add_argument("--sinks", action="store_true", help="give each head one more logit")
    shape.add_argument("--model", metavar="NAME", help="read the shape from a Hugging Face configuration instead")
    shape.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of queries and dense caches (default bfloat16; of logits, and on a CPU, float32)",
    )
    shape.add_argument("--suite", action="store_true", help="the shapes that docs/gpu.md publishes, instead of one")
    codec = parser.add_argument_group("the codecs")
    codec.add_argument("--codec", metavar="CODEC", help=f"of keys and values: {', '.join(formats.REGISTRY)}")
    codec.add_argument("--keys", metavar="CODEC", help="of keys (default: the backend's)")
    codec.add_argument("--values", metavar="CODEC", help="of values (default: the backend's)")
    _add_ways(parser)


def _add_ways(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how")
    how.add_argument(
        "--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"some of {', '.join(TASKS)} (default all)"
    )
    how.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    how.add_argument("--steps", type=whole, default=20, metavar="N", help="steps enqueued at a time (default 20)")
    how.add_argument("--inner", choices=INNERS, default="inductor", help="compiler of steps (default inductor)")
    how.add_argument("--weights", type=size, metavar="BYTES", help="of the model, as 15GiB: for the streams that fit")
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, metavar="FILE", help="put the rows into FILE; others that it holds stay")
    out.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw attention's time against context (.svg, .png, ...)"
    )
    out.add_argument("--check", type=Path, metavar="FILE", help="measure FILE's rows again; exit 1 if a ratio fell")
    out.add_argument("--tolerance", type=percent, default=5.0, metavar="PERCENT", help="of --check (default 5)")
    out.add_argument("--format", choices=("simple", "github"), default="simple", help="of tables (default simple)")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure what was asked for; 0, or 1 where one was not measured, or a ratio fell."""
    try:
        device = request.device(options)
        old = request.old_rows(options, device)
        plan = request.plan(options, device, old)
        layers, weights = request.model_size(options, plan)
    except ValueError as error:
        parser.error(str(error))
    compile_cpu = device.type == "cpu" and options.inner == "inductor"
    cpu.use_row_compiler(compile_rows if compile_cpu else None)
    free, session, found = clock.free_bytes(device), Session(device, options.steps), []
    facts = clock.surroundings(device)
    print(f"{facts['device']}; {', '.join(f'{name} {v}' for name, v in facts['versions'].items())}; {facts['date']}\n")
    try:
        failures = session.run(plan, found.append)
    finally:
        if options.json and found:
            rows.write(options.json, found)
    for failure in failures:
        print(f"not measured: {failure}\n")
    if options.check:
        shown, slower = rows.compare(old, found, options.tolerance, options.format)
        print(f"{shown}\n\n{len(slower)} of {len(found)} rows are slower by more than {options.tolerance:g} %")
        return 1 if failures or slower else 0
    print(rows.table(found, options.format) + "\n\n" + NOTES.format(speed=session.speed / 1e9))
    if free is not None and not options.suite and {"attend", "step"} & {row.case.task for row in found}:
        print("\n" + rows.streams(found, layers, free, weights, options.format))
    if options.plot and any(row.case.task == "attend" for row in found):
        figure.draw(found, options.plot)
    return 1 if failures else 0
