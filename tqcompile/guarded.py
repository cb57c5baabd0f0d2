"""What Dynamo guards of a compressed cache, beside its shape."""

from dataclasses import dataclass
from functools import cache

import torch

from tqcompile.centre import Centre
from tqcompile.codec import Codec


@dataclass(frozen=True, eq=False)
class Guarded:
    """What a compiled graph takes for granted: one object for all caches that are alike, so that it is compared as one.

    `centre` is its kind, or None.
    """

    codec: str
    dtype: torch.dtype
    device: torch.device
    centre: object

    def __deepcopy__(self, memo) -> "Guarded":
        return self


_interned = cache(Guarded)


def guarded(codec: Codec, dtype: torch.dtype, device: torch.device, centre: Centre | None) -> Guarded:
    """That of a cache of `codec` and `dtype` on `device`, whose tokens `centre` was taken off."""
    return _interned(codec.name, dtype, device, None if centre is None else centre.kind)
