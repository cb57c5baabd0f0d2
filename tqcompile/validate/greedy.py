"""Greedy continuations: the likeliest token at each step, and how long two models choose alike."""

from collections.abc import Callable

import torch

from tqcompile.validate.reading import Reading


def continued(
    reading: Reading, ids: torch.Tensor, sizes: list[int], count: int, ends: Callable[[list[int]], bool] | None = None
) -> tuple[list[int], object]:
    """Up to `count` tokens behind `ids` [T], fewer where `ends` of those so far; and the cache of all that was read."""
    cache = reading.new_cache()
    last, chosen = reading.last(ids, sizes, cache), []
    while True:
        chosen.append(int(last.argmax()))
        if len(chosen) == count or (ends is not None and ends(chosen)):
            return chosen, cache
        last = reading.call(ids.new_tensor(chosen[-1:]), cache)[-1]


def agreement(reading: Reading, ids: torch.Tensor, sizes: list[int], dense: list[int]) -> tuple[int, object]:
    """How many of dense's tokens the model chooses, too, before the first that differs; and its cache."""
    cache = reading.new_cache()
    last = reading.last(ids, sizes, cache)
    for at, token in enumerate(dense):
        if int(last.argmax()) != token:
            return at, cache
        if at + 1 < len(dense):
            last = reading.call(ids.new_tensor([token]), cache)[-1]
    return len(dense), cache
