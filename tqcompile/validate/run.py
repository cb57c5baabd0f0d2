"""The whole measurement: dense first, then each choice through the public backend, over the same tokens."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from tqcompile.backend import turboquant
from tqcompile.bench import clock
from tqcompile.explain.section import spoken
from tqcompile.validate import text
from tqcompile.validate.choice import Choice, choices
from tqcompile.validate.compare import RESAMPLES, block_size
from tqcompile.validate.measure import Exact, Measure, Plan, limit
from tqcompile.validate.reading import Reading
from tqcompile.validate.result import DENSE, Result, Row
from tqcompile.validate.settings import Settings
from tqcompile.validate.verdict import failures, sentence


def validate(
    model: torch.nn.Module,
    tokenizer,
    document: str | None = None,
    codecs: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Result:
    """Measure what each of `codecs` (names, KEYS/VALUES, or presets; every preset by default) costs on `document`.

    `model` is a causal language model of the transformers package, where it is to run; `document` is Python's own help
    where it is None.

    Raises:
        TypeError: `model` is no module.
        ValueError: an unknown codec, a text too short for the windows, or a context longer than the model reads.
    """
    settings = settings or Settings()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={model!r} is no torch.nn.Module; give a model, not its name")
    model = getattr(model, "_orig_mod", model)
    chosen = choices(list(codecs) if codecs is not None else None)
    _require_room(model, settings)
    plan = Plan.of(model, tokenizer, text.python_help() if document is None else document, settings)
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=(1 + len(chosen)) * plan.calls, desc="validate", unit="part", disable=None) as bar:
            dense, rows = _measured(model, plan, chosen, settings.inner, bar)
    finally:
        model.train(was_training)
    failed = {row.name: failures(row, dense, settings.threshold) for row in rows}
    verdict = sentence(rows, dense, failed, settings.threshold)
    return Result(_head(model, plan, document, settings), dense, rows, failed, _notes(plan, dense), verdict)


def _require_room(model: torch.nn.Module, settings: Settings) -> None:
    most = limit(model)
    if most is not None and settings.context > most:
        raise ValueError(f"context={settings.context}: this model reads {most} tokens; give a shorter context")


def _measured(model, plan: Plan, chosen: list[Choice], inner: str, bar: tqdm) -> tuple[Row, list[Row]]:
    dense, rows = Row(DENSE), [Row.of(choice) for choice in chosen]
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        exact = Exact(Path(folder))
        bar.set_postfix_str(DENSE)
        with Reading(model, inner).open() as reading:
            Measure(reading, plan, dense, exact, bar).all()
        for choice, row in zip(chosen, rows):
            clock.release(device)
            bar.set_postfix_str(row.name)
            done = bar.n
            try:
                with Reading(model, turboquant(**dict(choice.options), inner=inner)).open() as reading:
                    Measure(reading, plan, row, exact, bar).all()
            except Exception as error:
                # Whatever a model raises over codes, the other rows are measured.
                row.trouble = spoken(error)
                bar.update(done + plan.calls - bar.n)
        del exact
    return dense, rows


def _head(model: torch.nn.Module, plan: Plan, document: str | None, settings: Settings) -> dict[str, str]:
    parameter = next(model.parameters())
    facts = clock.surroundings(parameter.device)
    count, length = plan.windows.shape
    source = text.PYTHON_HELP if document is None else f"{len(document):,} characters"
    return {
        "model": f"{type(model).__name__}, {str(parameter.dtype).removeprefix('torch.')}, inner {settings.inner}",
        "text": f"{count} windows of {length:,} tokens, spread evenly over {source}",
        "read": f"{plan.pieces.first} tokens, not scored, then {plan.pieces.chunks} chunks of {plan.pieces.chunk}",
        "scored": f"{count * plan.scored:,} tokens, each predicted over a cache of codes, its own among them",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "device": facts["device"],
        "date": facts["date"],
    }


def _notes(plan: Plan, dense: Row) -> list[str]:
    size = block_size(plan.scored)
    blocks = len(plan.windows) * (plan.scored // size)
    notes = [
        "bits: of each number of the tokens held, scales included; live bytes: storages at the end of a window, spare "
        "room included",
        f"perplexity: its increase over dense's, and the 95 % percentile interval of a paired bootstrap, {RESAMPLES:,} "
        f"draws from {blocks} blocks of {size} tokens, of the difference of the two losses",
        "damage: squared error over squared length of the keys and values of first pieces, as the cache of the "
        "compiled model held them after the call that encoded them, against the dense cache's of the same tokens",
    ]
    if plan.generate:
        notes.append(f"greedy: of {plan.generate} greedy tokens, how many are dense's before the first that differs")
    if plan.needles:
        notes.append("needle: a number in one of four facts; found where each digit is the likeliest after the last")
        if not dense.found:
            notes.append("the dense model finds no needle at all, so that this grid tells nothing of any codec")
    if plan.items:
        notes.append(f"tasks: {len(plan.items)} items; a mean over few of them moves by chance as much as by a codec")
    return notes
