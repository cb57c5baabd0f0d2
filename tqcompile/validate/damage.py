"""What a codec does to keys and values themselves, layer by layer, before any layer has seen another's damage.

A call that fills an empty cache attends over its exact numbers and encodes them at its end. So the keys and values that
the compressed cache then holds are codes of those that the dense cache holds for the same tokens, in every layer.
"""

from dataclasses import dataclass

import torch


@dataclass
class Damage:
    """Squared error and squared length, summed over windows, for the keys and the values of each layer."""

    error: torch.Tensor
    square: torch.Tensor

    @classmethod
    def none(cls) -> "Damage":
        return cls(torch.zeros(0, 2, dtype=torch.double), torch.zeros(0, 2, dtype=torch.double))

    def add(self, exact: list[tuple[torch.Tensor, torch.Tensor]], cache) -> None:
        """Another window: the dense keys and values of each layer, and the cache that holds the same tokens."""
        error, square = [], []
        for pair, layer in zip(exact, layers(cache), strict=True):
            ours = [x.decode() if hasattr(x, "decode") else x for x in layer]
            pairs = [(x.to(y.device).double(), y.double()) for x, y in zip(pair, ours)]
            error.append([float((x - y).square().sum()) for x, y in pairs])
            square.append([float(x.square().sum()) for x, _ in pairs])
        now = torch.tensor(error, dtype=torch.double), torch.tensor(square, dtype=torch.double)
        before = self.error.shape[0] == 0
        self.error, self.square = now if before else (self.error + now[0], self.square + now[1])

    def relative(self) -> tuple[list[float], list[float]]:
        """Relative squared errors of the layers' keys, and of their values."""
        found = self.error / self.square.clamp_min(torch.finfo(torch.double).tiny)
        return tuple(found[:, side].tolist() for side in range(2)) if len(found) else ([], [])


def layers(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer that has both."""
    found = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [pair for pair in found if all(isinstance(x, torch.Tensor) for x in pair)]


def kept(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies on the CPU of a dense cache's keys and values."""
    return [tuple(x.detach().clone().cpu() for x in pair) for pair in layers(cache)]
