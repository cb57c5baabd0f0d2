"""Vectors, their coordinates in the bases of a codec, and what a codec makes of them."""

import pytest
import torch

from tqcompile import coding, reference, tables
from tqcompile.codec import Codec
from tqcompile.formats import REGISTRY

EVERY_CODEC = pytest.mark.parametrize("codec", REGISTRY.values(), ids=REGISTRY)
HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 192, 256)


def every(condition):
    """A mark that runs a test over the codecs for which `condition` holds."""
    found = [codec for codec in REGISTRY.values() if condition(codec)]
    assert found, "a test over no codec checks nothing"
    return pytest.mark.parametrize("codec", found, ids=[codec.name for codec in found])


def normal(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    """Independent standard normal numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(codec: Codec, *shape: int, seed=0, dtype=torch.float32) -> torch.Tensor:
    """Normal vectors of shape[-1] numbers in the codec's basis, [..., coordinates]."""
    return into(codec, normal(*shape, seed=seed)).to(dtype)


def into(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """x [..., head_dim] -> its coordinates in the codec's basis, [..., coordinates]."""
    return reference.rotate(x, tables.basis_matrix(codec, x.shape[-1]))


def round_trip(codec: Codec, y: torch.Tensor) -> torch.Tensor:
    """What rows in the codec's basis are decoded to."""
    return coding.decode(codec, coding.encode(codec, y), codec.head_dim(y.shape[-1]))


def rebuilt(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """The vectors that a cache of x [..., head_dim] stands for, float32."""
    numbers = round_trip(codec, into(codec, x))
    return reference.rotate_back(numbers, tables.basis_matrix(codec, x.shape[-1]), torch.float32)
