"""What Dynamo guards of a compressed cache, beside its shape."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch


@dataclass(frozen=True, eq=False)
class Guarded:
    """What a compiled graph takes for granted: one object for all caches that are alike, so that it is compared as one.

    `centre` is its kind, or None.
    """

    codec: str
    dtype: torch.dtype
    device: torch.device
    centre: object

    def __reduce__(self):
        return guarded, (self.codec, self.dtype, self.device, self.centre)


_one_each: dict[tuple, Guarded] = {}


def guarded(*what) -> Guarded:
    """The one of these fields."""
    return _one_each.setdefault(what, Guarded(*what))


@cache
def flattener(codec: str, dtype: torch.dtype, device: torch.device, centre: object) -> Callable[[], tuple]:
    """`__tensor_flatten__` of such caches, which guards call twice for each at each call of a graph: no Python there.

    Dynamo sees a dense tensor: planes as its inner ones would bring their sizes.
    """
    return partial(tuple, (["anchor"], guarded(codec, dtype, device, centre)))
