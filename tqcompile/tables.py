"""Every number a format needs, derived from its definition: rotations and Lloyd-Max codebooks."""

from functools import cache
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import root
from scipy.special import betainc, betaincinv, gammaln

from tqcompile.codec import Codec, Lookup

ROTATION_SEED = 2504_19874
POLYNOMIAL_TERMS = 5


@cache
def sphere_codebook(bits: int, head_dim: int) -> tuple[float, ...]:
    """Lloyd-Max centroids of one coordinate of a uniform point on the sphere of radius sqrt(head_dim).

    Each centroid is the mean of the density between the midpoints to its neighbours (TurboQuant, arXiv
    2504.19874, eq. 4). The coordinate divided by sqrt(head_dim) has density ~ (1 - x^2)^((head_dim - 3) / 2),
    so cell probabilities are incomplete Beta functions and cell means are elementary. Ascending, symmetric
    about zero, 2^bits entries.

    Raises:
        ValueError: `bits` outside 1..8, or `head_dim` under 2, where the density does not exist.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}; a codebook has 1 to 8 bits")
    if head_dim < 2:
        raise ValueError(f"head_dim={head_dim}; a coordinate on the sphere needs at least 2")
    levels = 2 ** (bits - 1)
    # Panter-Dite: the best cells of a fine quantiser are uniform under the cube root of the density.
    tail = (head_dim - 3) / 6 + 1
    start = np.sqrt(betaincinv(0.5, max(tail, 0.5), (np.arange(levels) + 0.5) / levels))
    solution = root(lambda c: _cell_means(_edges(c), head_dim) - c, start, method="hybr", tol=1e-13)
    centroids = np.sort(solution.x)
    residual = np.abs(_cell_means(_edges(centroids), head_dim) - centroids).max()
    assert residual < 1e-9, f"no Lloyd-Max solution at {bits} bits, head_dim {head_dim}: residual {residual}"
    positive = centroids * np.sqrt(head_dim)
    return tuple(float(c) for c in np.concatenate([-positive[::-1], positive]))


def sphere_distortion(bits: int, head_dim: int) -> float:
    """Mean squared error of the Lloyd-Max codebook, for a vector of unit length: E|x - Q(x)|^2.

    At a Lloyd-Max solution this is 1 - head_dim * E[c^2], because a centroid is the mean of its cell.
    """
    centroids = np.array(sphere_codebook(bits, head_dim)[2 ** (bits - 1) :]) / np.sqrt(head_dim)
    mass, _ = _cells(_edges(centroids), head_dim)
    return float(1 - head_dim * (mass * centroids**2).sum())


def boundaries(codebook: tuple[float, ...]) -> tuple[float, ...]:
    """The midpoints between neighbouring centroids: where a nearest-centroid quantiser changes its code."""
    return tuple((low + high) / 2 for low, high in pairwise(codebook))


@cache
def rotation(head_dim: int, seed: int = ROTATION_SEED) -> torch.Tensor:
    """A Haar-distributed orthogonal matrix [head_dim, head_dim], float32 on the CPU; `x @ rotation.T` rotates rows.

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q (Mezzadri, 2007).
    """
    gaussian = np.random.default_rng((seed, head_dim)).standard_normal((head_dim, head_dim))
    q, r = np.linalg.qr(gaussian)
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))


@cache
def basis_matrix(
    codec: Codec, head_dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor | None:
    """The matrix whose rows are the codec's basis, or None where that is the model's own."""
    return rotation(head_dim).to(device, dtype) if codec.basis == "rotation" else None


@cache
def polynomial(lookup: Lookup, head_dim: int) -> tuple[float, ...] | None:
    """Coefficients a_i of sum_i a_i x^(2i+1), x = code - (2^bits - 1) / 2: the numbers of a codebook look-up.

    Codebooks are smooth and odd, and a few multiplications cost less than a look-up in a vector unit. Up to four
    bits the fit is the codebook to 1e-4; at five it adds under 0.2 % to the distortion. Beyond that, None.
    """
    assert lookup.table == "codebook", f"{lookup.table} look-ups are computed, not tabled"
    bits = lookup.plane.bits
    if bits > 5:
        return None
    positive = np.array(sphere_codebook(bits, head_dim)[2 ** (bits - 1) :])
    mass, _ = _cells(_edges(positive / np.sqrt(head_dim)), head_dim)
    top = len(positive) - 0.5
    powers = 2 * np.arange(min(POLYNOMIAL_TERMS, len(positive))) + 1
    # Least squares under the cells' probabilities is the least distortion; x / top keeps it well conditioned.
    x, weight = (np.arange(len(positive)) + 0.5) / top, np.sqrt(mass)
    fit = np.linalg.lstsq(x[:, None] ** powers * weight[:, None], positive * weight, rcond=None)[0]
    return tuple(float(a) for a in fit / top**powers)


@cache
def integers(lookup: Lookup, head_dim: int) -> tuple[tuple[int, ...], float] | None:
    """The numbers of a codebook look-up of up to five bits as integers, and their unit; None for other look-ups.

    Matrix units multiply bytes, and get sixteen or more numbers as sums of bytes (`kernels.ptx`): no two numbers that
    share one may be further apart than 127. Of the units that allow it, within a fifth of the smallest, the one of
    least distortion, which adds under 0.2 % to the best up to four bits, and under 0.9 % at five.
    """
    if lookup.table != "codebook" or lookup.plane.bits > 5:
        return None
    coefficients, half = polynomial(lookup, head_dim), 2 ** (lookup.plane.bits - 1)
    x = np.arange(half) + 0.5
    positive = sum(a * x ** (2 * i + 1) for i, a in enumerate(coefficients))
    spread = (positive + positive[::-1]).max() if half >= 8 else positive[-1]
    mass, _ = _cells(_edges(positive / np.sqrt(head_dim)), head_dim)
    units = spread / np.linspace(126.4, 105, 400)
    places = np.round(positive / units[:, None])
    # Away from a tie, so that whoever rounds the polynomial rounds alike.
    clear = np.abs(np.abs(positive / units[:, None] - places) - 0.5).min(1) > 0.02
    loss = (mass * (positive - places * units[:, None]) ** 2).sum(1)
    best = np.where(clear, loss, np.inf).argmin()
    whole = [int(place) for place in places[best]]
    return (*(-place for place in reversed(whole)), *whole), float(units[best])


@cache
def numbers(lookup: Lookup, head_dim: int) -> tuple[float, ...]:
    """The table of a codebook look-up: the number of each code, in order of the code."""
    whole, bits = integers(lookup, head_dim), lookup.plane.bits
    if whole is not None:
        return tuple(place * whole[1] for place in whole[0])
    coefficients = polynomial(lookup, head_dim)
    if coefficients is None:
        return sphere_codebook(bits, head_dim)
    x = np.arange(2**bits) - (2**bits - 1) / 2
    return tuple(float(c) for c in sum(a * x ** (2 * i + 1) for i, a in enumerate(coefficients)))


def unit(lookup: Lookup, head_dim: int) -> float:
    """What numbers are multiples of where they are whole; 1 elsewhere."""
    whole = integers(lookup, head_dim)
    return 1.0 if whole is None else whole[1]


def _edges(centroids: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], (centroids[1:] + centroids[:-1]) / 2, [1.0]])


def _cells(edges: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Probability and first moment of |x| between edges."""
    edges = np.clip(edges, 0.0, 1.0)
    half = (head_dim - 1) / 2
    mass = np.diff(betainc(0.5, half, edges**2))
    peak = 2 * np.exp(gammaln(head_dim / 2) - gammaln(half)) / np.sqrt(np.pi)
    moment = -np.diff((1 - edges**2) ** half) * peak / (2 * half)
    return mass, moment


def _cell_means(edges: np.ndarray, head_dim: int) -> np.ndarray:
    mass, moment = _cells(edges, head_dim)
    middle = (edges[1:] + edges[:-1]) / 2
    return np.where(mass > 1e-300, moment / np.maximum(mass, 1e-300), middle)
