"""The first and the last tokens of a cache as exact numbers, beside the codes of all of them.

Codes stay complete: what knows nothing of this reads them, and is right, only less exact. The first N tokens and the
last W that were written are kept in N + W slots, and an index says which token a slot holds. Token p has one slot, p
or N + (p - N) % W, so that the next write to it cannot leave an older one of it behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Regions:
    """How many tokens of a cache are kept so: its first `sinks` and its last `window`, which lie along `dim`.

    Raises:
        ValueError: a number below zero, or none to keep.
    """

    dim: int
    sinks: int
    window: int

    def __post_init__(self):
        if min(self.dim, self.sinks, self.window) < 0 or not self.slots:
            raise ValueError(f"{self}: want a dimension counted from the front, and at least one token to keep")

    @property
    def slots(self) -> int:
        return self.sinks + self.window

    def __str__(self) -> str:
        return f"first {self.sinks} and last {self.window} tokens"


@dataclass(eq=False)
class Recent:
    """`numbers` [..., N + W + 1, head_dim] in the cache's order and dtype; `index` int64 [N + W + 1], -1 for no token.

    The last slot takes what is not to be kept. Caches that continue or show one another may hold the same one: an entry
    of a token that a cache does not have says nothing of that cache.
    """

    numbers: torch.Tensor
    index: torch.Tensor
    regions: Regions

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.numbers, self.index

    @torch.inference_mode(False)
    def copy(self, length: int) -> "Recent":
        """One for a cache of the first `length` tokens."""
        index = torch.where(self.index < length, self.index, -1)
        return replace(self, numbers=self.numbers.clone(), index=index)

    @torch.inference_mode(False)
    def selected(self, dim: int, places: torch.Tensor) -> "Recent":
        """One for the `places` of a cache along a dimension that is not of tokens."""
        return replace(self, numbers=self.numbers.index_select(dim, places), index=self.index.clone())

    @torch.inference_mode(False)
    def less(self, centre) -> "Recent":
        """One for keys that a `centre.Centre` is taken off, or this one for None."""
        if centre is None:
            return self
        return replace(self, numbers=centre.less(self.numbers, self.index.clamp(min=0)))

    def void(self) -> None:
        """Forget every token, for all that hold it."""
        self.index.fill_(-1)


@torch.inference_mode(False)
def empty(cache: torch.Tensor, regions: Regions) -> Recent:
    """Slots for a cache [..., head_dim], that hold nothing."""
    return Recent(*vacant(cache, regions.dim, regions.slots), regions)


def vacant(cache: torch.Tensor, dim: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers and the index of so many slots that hold nothing."""
    sizes = (*cache.shape[:dim], slots + 1, *cache.shape[dim + 1 :])
    numbers = torch.zeros(sizes, dtype=cache.dtype, device=cache.device)
    return numbers, torch.full((slots + 1,), -1, device=cache.device)


def slots_of(positions: torch.Tensor, newest, sinks: int, window: int) -> torch.Tensor:
    """The slot of each token, int64: the last one for those that are not kept, with `newest` the last that is written.

    Tokens that are kept have slots of their own.
    """
    ring = sinks + (positions - sinks) % max(1, window)
    kept = torch.where((positions > newest - window) & (positions >= sinks), ring, sinks + window)
    return torch.where(positions < sinks, positions, kept)


def remember(
    numbers: torch.Tensor,
    index: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor | None,
    start: int,
    dim: int,
    sinks: int,
) -> None:
    """Put into their slots those of `tokens` [..., T, head_dim] that are kept, in place.

    They are written at `positions` int64 [T], or else from `start` on. What slots hold of the places between the first
    and the last of these is forgotten.
    """
    count, slots = tokens.shape[dim], index.shape[0] - 1
    if count == 0:
        return
    if positions is None:
        # The others of them would go to the last slot, one by one.
        head, tail = min(count, max(0, sinks - start)), max(0, count - (slots - sinks))
        if head < tail:
            tokens = torch.cat([tokens.narrow(dim, 0, head), tokens.narrow(dim, tail, count - tail)], dim)
        runs = (start, start + head), (start + max(head, tail), start + count)
        positions = torch.cat([torch.arange(*run, device=index.device) for run in runs])
        first, last = start, start + count - 1
    else:
        first, last = positions.amin(), positions.amax()
    index.masked_fill_((index >= first) & (index <= last), -1)
    if not positions.numel():
        return
    slot = slots_of(positions, last, sinks, slots - sinks)
    index.index_copy_(0, slot, torch.where(slot < slots, positions, -1))
    numbers.index_copy_(dim, slot, tokens.to(numbers.dtype))


def first_and_last(dense: torch.Tensor, dim: int, sinks: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers and the index of a cache of the tokens `dense` [..., S, head_dim]."""
    length, slot = dense.shape[dim], torch.arange(sinks + window + 1, device=dense.device)
    # The newest token of each place of the ring.
    age = (length - 1 - slot) % max(1, window)
    token = torch.where(slot < sinks, slot, length - 1 - age)
    held = (slot < sinks + window) & (token < length) & ((slot < sinks) | (token >= sinks))
    numbers = dense.index_select(dim, token.clamp(0, length - 1))
    return numbers.contiguous(), torch.where(held, token, -1)


@torch.inference_mode(False)
@torch.no_grad()
def of_dense(dense: torch.Tensor, regions: Regions | None, filled: bool = True) -> Recent | None:
    """What is to be kept of a dense cache [..., S, head_dim]; None where that is nothing.

    All of its places hold tokens, or, where it is not `filled`, those up to the last that is not zeros.
    """
    if regions is None or not dense.numel():
        return None
    dense, length = dense.detach(), dense.shape[regions.dim]
    if not filled:
        others = [dim for dim in range(dense.dim()) if dim != regions.dim]
        places = (dense != 0).any(others).nonzero()
        length = int(places.amax()) + 1 if len(places) else 0
    if not length:
        return None
    return Recent(
        *first_and_last(dense.narrow(regions.dim, 0, length), regions.dim, regions.sinks, regions.window), regions
    )


@dataclass(frozen=True)
class Exact:
    """What attention reads exactly: keys and values [B, Hkv, r, D] of the tokens `places`, int64 [r].

    `q` [B, Hq, T, D] are its queries. All of it is in the model's basis.
    """

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor

    def mixed(self, weights: torch.Tensor) -> torch.Tensor:
        """weights [B, Hq, T, r] times values, float32: [B, Hq, T, D]."""
        batch, heads, queries, tokens = weights.shape
        rows = weights.float().reshape(batch, self.values.shape[1], -1, tokens)
        return (rows @ self.values.float()).view(batch, heads, queries, -1)


def exact(recent: Sequence[torch.Tensor], q: torch.Tensor, first: int, stop: int) -> Exact | None:
    """What keys and values, numbers [B, Hkv, slots, D] and index of each, both hold of the tokens first..stop.

    `places` count from `first`. Waits for the device, to know how many there are; None where there is none.
    """
    keys, index, values, _ = recent
    slots = counting(recent, first, stop).nonzero().squeeze(-1)
    if not slots.numel():
        return None
    places = index.index_select(0, slots) - first
    return Exact(q, keys.index_select(2, slots), values.index_select(2, slots), places)


def counting(recent: Sequence[torch.Tensor], first: int, stop: int) -> torch.Tensor:
    """Which slots hold, for keys and for values, one token of those from `first` to before `stop`: bool."""
    _, keys, _, values = recent
    return (keys == values) & (keys >= first) & (keys < stop)
