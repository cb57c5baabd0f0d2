"""What each architecture is put through: conversations of several calls over one cache, and beam search."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tqcompile.sweep.build import prompt

# The names a model's forward and its output have for a cache, newest first.
NAMES = ("cache", "past_key_values", "past_key_value", "cache_params", "state", "mems", "past_buckets_states")
ROOM, ENCODED = 48, 9
NEW_TOKENS = 6


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
    Scenario("beam", (8,), beams=2),
)


class NoCache(Exception):
    """The model returns nothing that a next call could continue."""


@dataclass
class Said:
    """What a model said in a scenario: logits of each call, and the cache object it left behind."""

    logits: list[torch.Tensor]
    cache: Any


@dataclass
class Inputs:
    """What a model's forward calls its tokens and their mask, and what every call gets besides."""

    tokens: str = "input_ids"
    mask: str = "attention_mask"
    extra: dict[str, Any] = field(default_factory=dict)
    prompt: torch.Tensor | None = None


def inputs_of(model, rows: int) -> Inputs:
    """What `rows` sequences need: an encoder runs once, untouched, and its output goes to every call."""
    if not model.config.is_encoder_decoder:
        return Inputs(extra=_required(model, rows))
    encoder, main = model.get_encoder(), _main_input(model)
    given = prompt(rows, ENCODED, seed=5) if main == "input_ids" else _picture(model, rows)
    with torch.no_grad():
        encoded = encoder(**{main: given}, return_dict=True)
    return Inputs("decoder_input_ids", "decoder_attention_mask", {"encoder_outputs": encoded}, given)


def _required(model, rows: int) -> dict[str, torch.Tensor]:
    """A picture, for a model that does not run without one."""
    named = inspect.signature(model.forward).parameters
    needs = "pixel_values" in named and named["pixel_values"].default is inspect.Parameter.empty
    return {"pixel_values": _picture(model, rows)} if needs else {}


def _main_input(model) -> str:
    named = inspect.signature(model.get_encoder().forward).parameters
    return "input_ids" if "input_ids" in named else next(iter(named))


def _picture(model, rows: int) -> torch.Tensor:
    """Random pixels of the size that the configuration of the encoder names."""
    config = getattr(model.config, "vision_config", None) or getattr(model.config, "encoder", None) or model.config
    size = getattr(config, "image_size", 32)
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    return torch.randn(rows, channels, *sides, generator=torch.Generator().manual_seed(5))


def cache_name(model) -> str | None:
    """What the model's forward calls its cache."""
    named = inspect.signature(type(model).forward).parameters
    return next((name for name in NAMES if name in named), None)


@torch.no_grad()
def play(scenario: Scenario, model, call: Callable) -> Said:
    """Hold the conversation of `scenario` with `call`, which is `model` or what a compiler made of it.

    Raises what the model raises, and `NoCache`.
    """
    inputs = inputs_of(model, scenario.rows)
    if scenario.beams:
        return _generate(scenario, model, call, inputs)
    ids = prompt(scenario.rows, sum(scenario.calls), seed=7)
    mask = _mask(scenario, ids)
    name, cache = cache_name(model), _static(model) if scenario.static else None
    logits, done = [], 0
    for count in scenario.calls:
        given = dict(inputs.extra)
        if cache is not None:
            given[name] = cache
        if mask is not None:
            given[inputs.mask] = mask[:, : done + count]
        given[inputs.tokens] = ids[:, done : done + count]
        result = call(**given, use_cache=True)
        logits.append(_logits(result))
        done += count
        cache = cache if scenario.static else _cache_of(result)
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
    from transformers import EncoderDecoderCache, StaticCache

    config = model.config.get_text_config(decoder=True)
    own = StaticCache(config=config, max_cache_len=ROOM)
    if not model.config.is_encoder_decoder:
        return own
    return EncoderDecoderCache(own, StaticCache(config=config, max_cache_len=ENCODED))


def _logits(result) -> torch.Tensor:
    found = getattr(result, "logits", None)
    return result[0] if found is None else found


def _cache_of(result) -> Any:
    return next((result[name] for name in NAMES if name in result and result[name] is not None), None)


def _generate(scenario: Scenario, model, call: Callable, inputs: Inputs) -> Said:
    own = inputs.prompt if inputs.prompt is not None else prompt(scenario.rows, scenario.calls[0], seed=9)
    if call is not model:
        model.forward = call
    try:
        result = model.generate(
            own,
            num_beams=scenario.beams,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **({} if inputs.prompt is not None else inputs.extra),
        )
    finally:
        if call is not model:
            del model.forward
    # The tokens take part in the comparison: a beam that was swapped for another has logits that look right.
    return Said([*result.logits, result.sequences.float()], _cache_of(result))
