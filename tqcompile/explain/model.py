"""A Hugging Face model made from its configuration, and the graphs of a prefill and two decode steps of it."""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path

import torch

from tqcompile.backend import Backend
from tqcompile.explain.section import Compiled, Layers, Section, spoken

CACHES = ("dynamic", "static")
# Two steps: the first finds caches of the prefill's length, and the second has Dynamo ask for any length.
PREFILL, STEPS, ROOM = 8, 2, 32
# A window that the prefill and the first step fill: the second step slides it.
WINDOW = PREFILL + 1
WINDOWS = ("sliding_window", "attention_chunk_size")


def config_of(name: str):
    """The configuration of the language model in a folder, in a file .gguf, or of a name known offline.

    Raises:
        ValueError: there is none, it is not one of a language model's, or transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ValueError(f"MODEL {name} needs transformers: pip install transformers") from None
    path = Path(name)
    source = {"pretrained_model_name_or_path": name}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**source, local_files_only=True).get_text_config()
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"MODEL {name} has no configuration to read: {str(error).splitlines()[0]}") from error
    if _class_for(config) is None:
        raise ValueError(f"MODEL {name}: transformers has no decoder of kind {config.model_type!r}")
    return config


def _class_for(config):
    """What makes a model of a configuration: with a head where there is one, for a head reads no cache."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForCausalLM

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModel if type(config) in MODEL_MAPPING and not config.is_encoder_decoder else None


def shortened(config, layers: int | None):
    """A copy of `config` with its first `layers` layers, and windows so short that a few tokens slide them.

    Raises:
        ValueError: the model has fewer layers, or its configuration says how many in a way that cannot be changed.
    """
    config, old = copy.deepcopy(config), config.num_hidden_layers
    for name in WINDOWS:
        if getattr(config, name, None):
            setattr(config, name, min(WINDOW, getattr(config, name)))
    if layers is None:
        return config
    if layers > old:
        raise ValueError(f"--layers {layers}: this model has {old}")
    try:
        for name, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == old:
                setattr(config, name, value[:layers])
        config.num_hidden_layers = layers
    except (AttributeError, ValueError) as error:
        raise ValueError(f"--layers {layers}: this configuration cannot be cut: {spoken(error)}") from error
    return config


def build(config, attention: str | None) -> torch.nn.Module:
    """The model of a configuration on the CPU, with random weights.

    Raises:
        ValueError: it has no attention of that kind.
    """
    dtype = getattr(config, "dtype", None) or torch.float32
    chosen = {} if attention is None else {"attn_implementation": attention}
    try:
        model = _class_for(config).from_config(config, dtype=dtype, **chosen)
    except ValueError as error:
        if attention is None:
            raise
        raise ValueError(f"--attention {attention}: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False)


def facts(model: torch.nn.Module, full) -> str:
    """What is explained, in a line: the model that ran, and what was left out of `full`, its configuration."""
    config = model.config
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    said = f"{type(model).__name__}, {config.num_hidden_layers} of {full.num_hidden_layers} layers, "
    said += f"{config._attn_implementation} attention, {dtype}, random weights"
    for name in WINDOWS:
        if getattr(full, name, None) != getattr(config, name, None):
            said += f"; {name} {getattr(config, name)} instead of {getattr(full, name)}, so that it slides in this run"
    return said


def sections(model: torch.nn.Module, full, kinds: list[str], backend: Backend, batch: int) -> Iterator[Section]:
    """What each kind of cache comes to: a prefill and two steps of `batch` sequences, compiled anew."""
    for kind in kinds:
        torch.compiler.reset()
        yield _section(model, full, kind, torch.compile(model, backend=backend), batch)


def _section(model: torch.nn.Module, full, kind: str, compiled, batch: int) -> Section:
    calls, new, trouble = {}, Compiled(), ""
    names = [f"prefill of {PREFILL} tokens", *(f"step {step + 1}" for step in range(STEPS))]
    vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(0)
    # The argument has had two names.
    given = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    call = names[0]
    try:
        cache = {given: _cache(model, kind)}
        for call, tokens in zip(names, (PREFILL, *[1] * STEPS)):
            ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
            try:
                with torch.no_grad():
                    compiled(input_ids=ids, use_cache=True, **cache)
            finally:
                calls |= {graph.name: call for graph in new.graphs() if graph.name not in calls}
    except Exception as error:
        # Whatever a model raises, what was seen until then is explained.
        trouble = f"{call} stopped with {spoken(error)}"
    return Section(f"{kind} cache", new.graphs(), calls, _layers(full, model.config, kind), trouble)


def _cache(model: torch.nn.Module, kind: str):
    from transformers import DynamicCache, StaticCache

    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=ROOM)


def _layers(full, config, kind: str) -> Layers:
    """The layers of the whole model, each by the class of its cache and the tokens that one keeps."""
    from transformers import DynamicCache

    kinds = []
    for layer in DynamicCache(config=full).layers:
        window = getattr(layer, "sliding_window", None)
        # A growing one drops its oldest token before the next comes; a static one keeps it until then.
        most = window - 1 if window and kind == "dynamic" else window
        kinds.append((type(layer).__name__, most))
    return Layers(tuple(kinds), config.num_hidden_layers)


def is_path(name: str) -> bool:
    """Whether a name means something on this machine, and not a model by its name."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
