"""What codecs do to random vectors: the error, its share along the vector, and the error of inner products."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tqcompile import tables
from tqcompile.codec import Codec
from tqcompile.coding import decode, encode

QUERIES = 16
# Vectors that are encoded at a time, which bounds what that takes.
CHUNK = 1024


class Estimate(NamedTuple):
    """A mean over vectors, and its standard error; 0 where it was counted."""

    value: float
    error: float = 0.0

    def over(self, other: "Estimate") -> "Estimate":
        """The ratio of two, whose errors are taken for independent."""
        ratio = self.value / other.value
        return Estimate(ratio, abs(ratio) * math.hypot(self.error / self.value, other.error / other.value))

    def times(self, factor: float) -> "Estimate":
        return Estimate(self.value * factor, self.error * abs(factor))


@dataclass(frozen=True)
class Damage:
    """Of the error e = x' - x of decoded vectors x', for unit vectors x.

    `distortion` is |e|^2. `bias` is <x, e>, which is what a query in the direction of x sees, and, averaged over the
    random basis, any other in proportion. `product` is head_dim <y, e>^2 for unit queries y that know nothing of x.
    """

    distortion: Estimate
    bias: Estimate
    product: Estimate


class Sample:
    """Gaussian vectors [vectors, head_dim], and unit queries of each, [vectors, QUERIES, head_dim], float32."""

    def __init__(self, head_dim: int, vectors: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.head_dim, self.count = head_dim, vectors
        self.vectors = torch.randn(vectors, head_dim, generator=generator)
        queries = torch.randn(vectors, QUERIES, head_dim, generator=generator)
        self.queries = queries.div_(queries.norm(dim=-1, keepdim=True))
        self._damage: dict[Codec, Damage] = {}

    def damage(self, codec: Codec) -> Damage:
        """What `codec` does to these vectors, once measured."""
        if codec not in self._damage:
            self._damage[codec] = self._measure(codec)
        return self._damage[codec]

    def _measure(self, codec: Codec) -> Damage:
        parts = zip(self.vectors.split(CHUNK), self.queries.split(CHUNK))
        return Damage(*map(_mean, torch.cat([_of_each(codec, *part) for part in parts]).unbind(-1)))


def _of_each(codec: Codec, vectors: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The three numbers of `Damage` for each vector, [vectors, 3], float64."""
    head_dim = vectors.shape[-1]
    basis = tables.basis_matrix(codec, head_dim)
    numbers = decode(codec, encode(codec, vectors if basis is None else vectors @ basis.T), head_dim)
    error = (numbers if basis is None else numbers @ basis) - vectors
    seen = (queries @ error.unsqueeze(-1)).squeeze(-1).square().mean(-1)
    found = torch.stack([error.square().sum(-1), (vectors * error).sum(-1), head_dim * seen], -1)
    return found.double() / vectors.square().sum(-1, keepdim=True)


def _mean(of_each: torch.Tensor) -> Estimate:
    return Estimate(of_each.mean().item(), (of_each.std() / math.sqrt(len(of_each))).item())
