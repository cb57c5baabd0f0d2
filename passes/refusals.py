"""Caches that stay dense, as values: the name of each, the reason, the model's line, and what would change it."""

import os
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tqcompile.cache import CompressedKV
from tqcompile.passes.nodes import spelling, tensor_of
from tqcompile.passes.overlooked import Overlooked

FOREIGN = "attention reads it, and no graph that was compiled keeps tokens in it"

WHOLE_TOKENS = "Keep whole tokens as they are: by slices, index_select, or gather with an index expanded over head_dim."

_TORCH = str(Path(torch.__file__).parent) + os.sep

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Refusal:
    """A cache that stays dense: its name in the model, why, where, and what would change that.

    `last` is the tensor of the last call, where that may be no cache: the report says nothing of what nobody keeps.
    `settled` gets a name of the cache where a later graph compresses the same tensor.
    """

    name: str
    reason: str
    where: str
    remedy: str
    last: list[weakref.ref] | None = field(default=None, compare=False)
    settled: list[str] = field(default_factory=list, compare=False)

    @property
    def under_strict(self) -> str:
        """What is raised where nothing may stay dense."""
        return f"strict=True, and {self.name} cannot be compressed: {self.reason} ({self.where}). {self.remedy}"

    @property
    def stands(self) -> bool:
        held = [tensor for tensor in map(weakref.ref.__call__, self.last or ()) if tensor is not None]
        return not self.settled and (self.last is None or any(not isinstance(tensor, CompressedKV) for tensor in held))


_REMEDIES = {
    "gradients flow through it": "Call the model under torch.no_grad() or torch.inference_mode().",
    "it is a DTensor, not a plain tensor": "Let each rank keep its own heads: shard the projections with "
    "use_local_output=True, or take to_local() before the cache.",
    "it is a view of another tensor": "Give each layer a cache tensor of its own.",
    "it is returned beside a part of it": "Keep the tensor alone, and cut what is read where it is read.",
    "other tensors share its memory": "Drop the other views of it before the first compiled call.",
    FOREIGN: "Where it is a cache, keep the tokens and read them in one graph.",
    "this graph writes it and never reads it": "It is compressed once a graph has attention that reads it.",
}


def refuse(root: fx.Node, reason: str, culprit: fx.Node | None = None) -> Refusal:
    """The refusal of a cache for a reason, at the line of `culprit` or of what uses it first."""
    remedy = _REMEDIES.get(reason, "It works as before, uncompressed.")
    return Refusal(name_of(root), reason, where(culprit or next(iter(root.users), root)), remedy)


def foreign_cache(cache: Overlooked) -> Refusal:
    """The refusal of what attention reads, which may be no cache."""
    return replace(refuse(cache.root, FOREIGN, cache.reader), last=[])


def remade_cache(cache: Overlooked) -> Refusal:
    """The refusal of a cache whose tokens are chosen or changed before they are kept."""
    reason = f"{spelling(cache.reader)} makes what is kept of it in a way that no rule follows"
    return replace(refuse(cache.root, reason, cache.reader), remedy=WHOLE_TOKENS)


def wrapped(value: torch.Tensor) -> str:
    """Why a tensor that wraps others, as one sharded over processes does, is no cache that planes can stand for."""
    return f"it is a {type(value).__name__}, not a plain tensor"


def unknown_cache(cache: Overlooked) -> Refusal:
    """The refusal of a cache that no pattern took for one."""
    value = tensor_of(cache.root)
    if is_traceable_wrapper_subclass(value):
        reason = wrapped(value)
    elif value.dim() != 4:
        reason = f"it has {value.dim()} dimensions, where keys and values have [batch, heads, tokens, head_dim]"
    elif value.dtype not in FLOATS:
        reason = f"its dtype is {value.dtype}"
    elif cache.reader is None:
        reason = "this graph writes it and never reads it"
    else:
        reason = f"{spelling(cache.reader)} reads it in a way that no attention pattern knows"
    return refuse(cache.root, reason, cache.reader or cache.kept)


def name_of(node: fx.Node) -> str:
    """What the model calls a tensor: its path from the compiled function's arguments, or the node's name."""
    source = getattr(node, "_dynamo_source", None)
    return getattr(source, "name", None) if isinstance(getattr(source, "name", None), str) else node.name


def where(node: fx.Node) -> str:
    """The line of the model's code that made a node."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    frames = [line for line in lines if line.startswith("File")]
    # A function of PyTorch that is inlined is called from the line that is meant.
    frames = [line for line in frames if _TORCH not in line] or frames
    return frames[-1].removeprefix("File ").replace('"', "") if frames else f"node {node.name}"
