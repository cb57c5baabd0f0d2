"""A model that reads: compiled by a backend, piece by piece, over a growing cache; and what became of that cache."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tqcompile.cache import CompressedKV
from tqcompile.explain.section import Compiled
from tqcompile.passes.sites import REPEATED, STATE


class Reading:
    """`model` under `torch.compile(model.forward, backend=backend)`, for as long as `open` is."""

    def __init__(self, model: torch.nn.Module, backend):
        self.model, self.backend = model, backend
        self.device = next(model.parameters()).device
        # The argument has had two names.
        self.given = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    @contextmanager
    def open(self) -> Iterator["Reading"]:
        """Compile anew on the first call; the model is as it was, afterwards."""
        torch.compiler.reset()
        self.compiled = Compiled()
        self.model.forward = torch.compile(self.model.forward, backend=self.backend)
        try:
            with torch.no_grad():
                yield self
        finally:
            del self.model.forward
            torch.compiler.reset()

    def new_cache(self):
        """An empty growing cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def call(self, ids: torch.Tensor, cache) -> torch.Tensor:
        """Logits [..., T, vocabulary] of the tokens `ids` [T] or [B, T], which the cache holds afterwards."""
        rows = ids.view(-1, ids.shape[-1]).to(self.device)
        logits = self.model(input_ids=rows, use_cache=True, **{self.given: cache}).logits
        return logits if ids.dim() == 2 else logits[0]

    def read(self, ids: torch.Tensor, sizes: list[int], cache) -> Iterator[torch.Tensor]:
        """The logits of each piece of `ids` [T] or [B, T]."""
        for piece in ids.split(sizes, -1):
            yield self.call(piece, cache)

    def last(self, ids: torch.Tensor, sizes: list[int], cache) -> torch.Tensor:
        """Logits [vocabulary] behind the last of `ids` [T]."""
        for logits in self.read(ids, sizes, cache):
            last = logits[-1]
        return last

    def stayed_dense(self, cache) -> list[str]:
        """Why figures over `cache` are not those of a compressed one; nothing where they are.

        A recurrence's state is no cache of tokens: nothing would compress it.
        """
        graphs = self.compiled.graphs()
        refused = {r.name: r for graph in graphs for r in graph.refusals if r.stands}
        found = [f"{r.name}: {r.reason} ({r.where})" for r in refused.values() if r.reason not in (STATE, REPEATED)]
        found += [f"{name}: {event}" for graph in graphs for name, event in graph.events.items()]
        kinds = [type(tensor) for tensor in tensors(cache)]
        dense = sum(kind is not CompressedKV for kind in kinds)
        if dense:
            found.append(f"{dense} of {len(kinds)} tensors of the model's cache are dense")
        return list(dict.fromkeys(found)) if kinds else [*found, "the model's cache holds no keys and values"]

    def decoded(self) -> list[str]:
        """Who read these caches decoded: right values, at the cost of a dense copy for as long as that reads."""
        graphs = self.compiled.graphs()
        found = [f"{fallback.name} in front of {fallback.operator}" for graph in graphs for fallback in graph.fallbacks]
        found += [f"for {reader}, which was not compiled" for graph in graphs for reader in graph.eager]
        return list(dict.fromkeys(found))


def tensors(cache) -> list[torch.Tensor]:
    """The key and value tensors of every layer that has them."""
    found = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def held_bytes(cache) -> int:
    """Bytes of all that it holds of its tokens, without spare room."""
    kept = (part for tensor in tensors(cache) for part in getattr(tensor, "tensors", (tensor,)))
    return sum(part.numel() * part.itemsize for part in kept)


def elements(cache) -> int:
    """The numbers that it stands for."""
    return sum(tensor.numel() for tensor in tensors(cache))
