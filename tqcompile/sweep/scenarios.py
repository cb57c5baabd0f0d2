"""What each architecture is put through: conversations of several calls over one cache, and beam search."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tqcompile.sweep.build import prompt

# The names a model's forward and its output have for a cache, newest first.
NAMES = ("cache", "past_key_values", "past_key_value", "cache_params", "state", "mems", "past_buckets_states")
ROOM = 48
BEAMS, NEW_TOKENS = 2, 6


@dataclass(frozen=True)
class Scenario:
    """Calls of so many tokens each over one cache; `padded` are the left paddings of the rows; `beams` generates."""

    name: str
    calls: tuple[int, ...]
    rows: int = 2
    static: bool = False
    padded: tuple[int, ...] = ()
    beams: int = 0


SCENARIOS = (
    Scenario("steps", (12, *(1,) * 24, 5)),
    Scenario("static", (12, *(1,) * 12, 5), static=True),
    Scenario("chunks", (5, 5, 5, 1, 1)),
    Scenario("padded", (10, 1, 1, 1, 4), rows=3, padded=(0, 2, 5)),
    Scenario("beam", (8,), beams=BEAMS),
)


class NoCache(Exception):
    """The model returns nothing that a next call could continue."""


@dataclass
class Said:
    """What a model said in a scenario: logits of each call, and the cache object it left behind."""

    logits: list[torch.Tensor]
    cache: Any


def cache_name(model) -> str | None:
    """What the model's forward calls its cache."""
    named = inspect.signature(type(model).forward).parameters
    return next((name for name in NAMES if name in named), None)


@torch.no_grad()
def play(scenario: Scenario, model, call: Callable, extra: dict[str, Any]) -> Said:
    """Hold the conversation of `scenario` with `call`, which is `model` or what a compiler made of it.

    `extra` are inputs that every call gets. Raises what the model raises, and `NoCache`.
    """
    if scenario.beams:
        return _generate(scenario, model, call, extra)
    ids = prompt(scenario.rows, sum(scenario.calls), seed=7)
    mask = _mask(scenario, ids)
    name, cache = cache_name(model), _static(model) if scenario.static else None
    logits, done = [], 0
    for count in scenario.calls:
        given = dict(extra)
        if cache is not None:
            given[name] = cache
        if mask is not None:
            given["attention_mask"] = mask[:, : done + count]
        result = call(input_ids=ids[:, done : done + count], use_cache=True, **given)
        logits.append(_logits(result))
        done += count
        cache = _cache_of(result) if not scenario.static else cache
        if cache is None or name is None:
            raise NoCache("its output holds no cache" if cache is None else "its forward takes no cache")
    return Said(logits, cache)


def _mask(scenario: Scenario, ids: torch.Tensor) -> torch.Tensor | None:
    if not scenario.padded:
        return None
    mask = torch.ones_like(ids)
    for row, padding in enumerate(scenario.padded):
        mask[row, :padding] = 0
    return mask


def _static(model):
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=ROOM)


def _logits(result) -> torch.Tensor:
    found = getattr(result, "logits", None)
    return result[0] if found is None else found


def _cache_of(result) -> Any:
    return next((result[name] for name in NAMES if name in result and result[name] is not None), None)


def _generate(scenario: Scenario, model, call: Callable, extra: dict[str, Any]) -> Said:
    own = model.forward
    if call is not model:
        model.forward = call
    try:
        result = model.generate(
            prompt(scenario.rows, scenario.calls[0], seed=9),
            num_beams=scenario.beams,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **extra,
        )
    finally:
        if call is not model:
            del model.forward
    assert model.forward == own
    # The tokens take part in the comparison: two beams that were swapped have the logits of the other one.
    return Said([*result.logits, result.sequences.float()], _cache_of(result))
