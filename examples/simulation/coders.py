"""Fake quantisers of keys and values: x [B, H, T, D] float32 in, what a cache would give back out, and bits counted.

Each is written from its source's own description, in plain PyTorch, for measurements (`frontier.py`). The package's
codecs are the same arithmetic on packed codes; here nothing is packed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.linalg import hadamard

from tqcompile import tables
from tqcompile.codec import Lookup, Plane

HALF_BITS = 16
# Scales in 8 bits: steps an octave and the lowest power of two. Of any vector, from 2^-11 to 2^10; of vectors whose
# usual size is known, from 2^-6 to 2^4.6. Rounding adds an error of 3e-4 and 7e-5 of a square.
ANY_SIZE, USUAL_SIZE = (12, -11), (24, -6)


@dataclass(frozen=True)
class Coder:
    """A quantiser: `code(x, seed)` gives x back with its loss, `bits(D)` says what an element takes, scales included.

    `seeded` says whether the loss depends on the seed of a random rotation. `constants` counts the numbers of a layer
    that a model keeps once, whatever it reads.
    """

    name: str
    bits: Callable[[int], float]
    code: Callable[[torch.Tensor, int], torch.Tensor]
    seeded: bool = False
    constants: int = 0


def half(x: torch.Tensor) -> torch.Tensor:
    """x as float16 would keep it."""
    return x.half().float()


def half_scale(x: torch.Tensor) -> torch.Tensor:
    """Scales in 16 bits."""
    return half(x)


def byte_scale(x: torch.Tensor, grid: tuple[int, int] = ANY_SIZE) -> torch.Tensor:
    """Positive scales in 8 bits, on a logarithmic grid; the lowest code is zero."""
    steps, low = grid
    code = (x.clamp_min(1e-30).log2().sub(low) * steps).round().clamp(0, 255)
    return torch.where(code > 0, (code / steps + low).exp2(), 0.0)


def turboquant(bits: int, scale_bits: int = HALF_BITS) -> Coder:
    """TurboQuant-mse (arXiv 2504.19874) with the unbiased scalar |x|^2 / <x, c> (arXiv 2108.08842)."""
    lookup = Lookup(Plane("codes", bits), "codebook")

    def code(y: torch.Tensor, head_dim: int) -> torch.Tensor:
        codebook = y.new_tensor(tables.numbers(lookup, head_dim))
        return codebook[torch.bucketize(y, (codebook[1:] + codebook[:-1]) / 2)]

    return on_the_sphere(f"{bits}", bits, scale_bits, code)


def on_the_sphere(
    name: str, bits: float, scale_bits: int, nearest: Callable[[torch.Tensor, int], torch.Tensor]
) -> Coder:
    """Rotate, scale to length sqrt(D), let `nearest` choose codes' numbers, and keep one scalar a vector."""
    keep = {16: half_scale, 8: byte_scale}[scale_bits]

    def code(x: torch.Tensor, seed: int) -> torch.Tensor:
        head_dim = x.shape[-1]
        basis = tables.rotation(head_dim, seed).to(x.device)
        y = x @ basis.T
        size = y.norm(dim=-1, keepdim=True).clamp_min(1e-30) / math.sqrt(head_dim)
        numbers = nearest(y / size, head_dim)
        fitted = (y / size * numbers).mean(-1, keepdim=True)
        return (numbers * keep(torch.where(fitted > 0, size / fitted, 0.0))) @ basis

    suffix = "" if scale_bits == HALF_BITS else "s8"
    return Coder(name + suffix, lambda head_dim: bits + scale_bits / head_dim, code, seeded=True)


def q8_0(block: int = 32) -> Coder:
    """llama.cpp's Q8_0: blocks of 32, a float16 scale of the largest magnitude over 127."""

    def code(x: torch.Tensor, seed: int) -> torch.Tensor:
        parts = x.unflatten(-1, (-1, block))
        scale = parts.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(scale > 0, parts / scale, 0.0).round()
        return (codes * half(scale)).flatten(-2)

    return Coder("q8_0", lambda head_dim: 8 + HALF_BITS / block, code)


def q4_0(block: int = 32) -> Coder:
    """llama.cpp's Q4_0: blocks of 32, a float16 scale that puts the entry of largest magnitude at code -8."""

    def code(x: torch.Tensor, seed: int) -> torch.Tensor:
        parts = x.unflatten(-1, (-1, block))
        scale = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)) / -8
        codes = (torch.where(scale != 0, parts / scale, 0.0) + 8.5).floor().clamp(0, 15) - 8
        return (codes * half(scale)).flatten(-2)

    return Coder("q4_0", lambda head_dim: 4 + HALF_BITS / block, code)


def with_hadamard(inner: Coder) -> Coder:
    """`inner` on coordinates in the basis of a Hadamard matrix, as llama.cpp has rotated quantised caches since 2026.

    Raises:
        ValueError: head_dim is no power of two.
    """

    def code(x: torch.Tensor, seed: int) -> torch.Tensor:
        head_dim = x.shape[-1]
        if head_dim & (head_dim - 1):
            raise ValueError(f"head_dim={head_dim}; a Hadamard matrix here has a power of two. Leave this system out")
        basis = torch.tensor(hadamard(head_dim), dtype=x.dtype, device=x.device) / math.sqrt(head_dim)
        return inner.code(x @ basis, seed) @ basis.T

    return Coder(f"{inner.name}+Hadamard", inner.bits, code)


def norm_corrected(bits: int) -> Coder:
    """Keys of vLLM's `turboquant_*_nc`: a rotation, Lloyd-Max codes, and |x| / |c| in float16 ("norm correction")."""
    lookup = Lookup(Plane("codes", bits), "codebook")

    def code(x: torch.Tensor, seed: int) -> torch.Tensor:
        head_dim = x.shape[-1]
        basis = tables.rotation(head_dim, seed).to(x.device)
        y = x @ basis.T
        codebook = y.new_tensor(tables.sphere_codebook(lookup.plane.bits, head_dim))
        size = y.norm(dim=-1, keepdim=True)
        unit = y / size.clamp_min(1e-30) * math.sqrt(head_dim)
        numbers = codebook[torch.bucketize(unit, (codebook[1:] + codebook[:-1]) / 2)]
        return (numbers * half(size / numbers.norm(dim=-1, keepdim=True))) @ basis

    return Coder(f"{bits}nc", lambda head_dim: bits + HALF_BITS / head_dim, code, seeded=True)


def _asymmetric(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Uniform codes between the least and the largest entry along `dim`; step and zero point in float16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low, step = half(low), half((high - low) / (2**bits - 1))
    codes = torch.where(step > 0, (x - low) / step, 0.0).round().clamp(0, 2**bits - 1)
    return codes * step + low


def uniform_vectors(bits: int) -> Coder:
    """Values of vLLM's settings: uniform codes of each vector between its extremes, step and zero in float16."""
    return Coder(f"{bits}u", lambda head_dim: bits + 2 * HALF_BITS / head_dim, lambda x, seed: _asymmetric(x, bits, -1))


def kivi_keys(bits: int, group: int = 32) -> Coder:
    """KIVI's keys (arXiv 2402.02750): uniform codes of each channel over groups of 32 tokens."""

    def code(x: torch.Tensor, seed: int) -> torch.Tensor:
        if x.shape[-2] % group:
            raise ValueError(f"{x.shape[-2]} tokens are no multiple of KIVI's groups of {group}. Change --length")
        return _asymmetric(x.unflatten(-2, (-1, group)), bits, -2).flatten(-3, -2)

    return Coder(f"{bits}kivi", lambda head_dim: bits + 2 * HALF_BITS / group, code)


def kivi_values(bits: int, group: int = 32) -> Coder:
    """KIVI's values: uniform codes of each token over groups of 32 channels."""

    def code(x: torch.Tensor, seed: int) -> torch.Tensor:
        return _asymmetric(x.unflatten(-1, (-1, group)), bits, -1).flatten(-2)

    return Coder(f"{bits}kivi", lambda head_dim: bits + 2 * HALF_BITS / group, code)


def exact() -> Coder:
    """16 bits."""
    return Coder("16", lambda head_dim: HALF_BITS, lambda x, seed: half(x))
