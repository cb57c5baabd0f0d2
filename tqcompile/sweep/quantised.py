"""The dense twin of a compressed model: the same eager model, whose caches hold what a codec makes of each number.

A graph that creates a cache attends over its own exact keys and values and encodes them at its output; every later one
reads codes, those of its own tokens too. A cache that is not initialised yet is about to be created.
"""

import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from unittest import mock

import torch

from tqcompile import formats
from tqcompile.cache import CompressedKV
from tqcompile.codec import Codec


def covers(path: str) -> bool:
    """Whether `quantised` can quantise what is stored under a path: not what a model keeps by methods of its own."""
    return re.fullmatch(r"((self|cross)_attention_cache\.)?layers\.\d+\.(keys|values)", path) is not None


@contextmanager
def quantised(codec: str, paths: Set[str]) -> Iterator[None]:
    """While it lasts, the caches of the transformers package quantise what they store under `paths`.

    A path is that of `live.held`: `layers.0.keys`, or `self_attention_cache.layers.0.keys`. The others stay exact.
    """
    from transformers import cache_utils

    update, chosen = cache_utils.Cache.update, formats.codec(codec)

    def nested(self, name, value):
        object.__setattr__(self, name, value)
        if name in ("self_attention_cache", "cross_attention_cache"):
            value._sweep_path = f"{name}."

    def updated(self, keys, values, layer_idx, *args, **kwargs):
        prefix = f"{getattr(self, '_sweep_path', '')}layers.{layer_idx}"
        wanted = [name for name in ("keys", "values") if f"{prefix}.{name}" in paths]
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if layer is not None and layer.is_initialized:
            keys = fake_quantised(keys, chosen) if "keys" in wanted else keys
            values = fake_quantised(values, chosen) if "values" in wanted else values
            return update(self, keys, values, layer_idx, *args, **kwargs)
        seen = update(self, keys, values, layer_idx, *args, **kwargs)
        seen = tuple(tensor.clone() for tensor in seen)
        for name in wanted:
            stored = getattr(self.layers[layer_idx], name)
            stored.copy_(fake_quantised(stored, chosen))
        return seen

    with (
        mock.patch.object(cache_utils.Cache, "update", updated),
        # Not when it is made: a model may put another cache in the place of one of its two.
        mock.patch.object(cache_utils.EncoderDecoderCache, "__setattr__", nested),
    ):
        yield


def fake_quantised(dense: torch.Tensor, codec: Codec) -> torch.Tensor:
    """What is left of `dense` [..., head_dim] after a codec."""
    return CompressedKV.encode(dense, codec).decode()
