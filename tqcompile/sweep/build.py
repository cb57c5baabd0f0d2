"""A tiny random model of an architecture: which there are, and which of a few variants of its sizes runs."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from tqcompile.sweep.shrink import SPECIAL, tiny_config

FAMILIES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}

# Tried in turn: more layers where an architecture needs some of each kind twice, open counts filled in or left.
VARIANTS = ({}, {"fill": True}, {"layers": 4}, {"layers": 4, "fill": True}, {"layers": 6})
SEED = 0


@dataclass(frozen=True)
class Architecture:
    """One entry of a mapping of the transformers package: its model type, and the name of its model's class."""

    family: str
    name: str
    model: str

    @property
    def key(self) -> str:
        return f"{self.family}/{self.name}"


def architectures(families=tuple(FAMILIES)) -> list[Architecture]:
    """Every architecture of the installed transformers package in these families, in the package's order."""
    from transformers.models.auto import modeling_auto

    found = []
    for family in families:
        names = getattr(modeling_auto, FAMILIES[family])
        found += [Architecture(family, name, _first(model)) for name, model in names.items()]
    return found


def _first(model: str | tuple) -> str:
    return model if isinstance(model, str) else model[0]


class NotMade(Exception):
    """No variant of an architecture's sizes gave a model that runs; says what the last one raised."""


def build(architecture: Architecture, try_out) -> tuple[Any, dict]:
    """A random model in float32 and eval mode that `try_out(model)` ran without an exception, and the variant it is.

    Raises:
        NotMade: all variants failed. The message is the first one's: the others are guesses.
    """
    first = None
    for variant in VARIANTS:
        try:
            model = make(architecture, variant)
            try_out(model)
            return model, variant
        except Exception as error:  # whatever a model raises makes the next variant worth a try
            first = first or error
    raise NotMade(f"{type(first).__name__}: {str(first).strip()}") from first


def make(architecture: Architecture, variant: dict | None = None):
    """A random model of an architecture, the same at every call."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    options = {"is_decoder": True} if architecture.family == "causal-lm" else {}
    config = tiny_config(CONFIG_MAPPING[architecture.name], options=options, **(variant or {}))
    kind = getattr(transformers, architecture.model, None) or _hidden(architecture)
    text = config.get_text_config(decoder=True)
    if not isinstance(config, kind.config_class) and isinstance(text, kind.config_class):
        config = text
    torch.manual_seed(SEED)
    with torch.no_grad():
        model = kind._from_config(config).float().eval().requires_grad_(False)
        _fill_holes(model)
    return model


def _hidden(architecture: Architecture) -> type:
    """A model's class that the package does not export."""
    module = architecture.name.replace("-", "_")
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), architecture.model)


def _fill_holes(model) -> None:
    """Numbers for parameters that a class leaves to its checkpoint: memory as it was found is no model."""
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all() or parameter.abs().max() > 100:
            parameter.normal_(std=0.1)


def prompt(rows: int, tokens: int, seed: int) -> torch.Tensor:
    """Random token ids [rows, tokens], none of them special."""
    return torch.randint(3, SPECIAL - 4, (rows, tokens), generator=torch.Generator().manual_seed(seed))
