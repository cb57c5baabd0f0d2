"""Greedy continuations: the likeliest token at each step, and how long two models choose alike."""

import torch

from tqcompile.validate.reading import Reading


def continued(reading: Reading, ids: torch.Tensor, sizes: list[int], count: int, stop=()) -> tuple[list[int], object]:
    """Up to `count` tokens behind `ids` [T], none of `stop`, which ends them; and the cache of all that was read."""
    cache = reading.new_cache()
    last, chosen = reading.last(ids, sizes, cache), []
    while len(chosen) < count:
        token = int(last.argmax())
        if token in stop:
            break
        chosen.append(token)
        if len(chosen) < count:
            last = reading.call(ids.new_tensor([token]), cache)[-1]
    return chosen, cache


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
