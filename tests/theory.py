"""What a codec does to a Gaussian vector, from integrals and closed forms; nothing here encodes anything."""

import math

import numpy as np
import torch
from scipy.integrate import quad
from scipy.special import erf
from scipy.stats import norm

from tqcompile import tables
from tqcompile.codec import Codec, Term
from tqcompile.paper.theory import mean_magnitude, polar_cosine

# Decibels by which a path's distortion is under a Lloyd-Max codebook's, at 64 to 256 coordinates, by bits: measured, as
# no closed form is known. The rate-distortion bound is 2.74, 3.44 and 3.86 under it where coordinates are many.
PATH_GAINS = {2: (1.78, 1.95), 3: (2.42, 2.52), 4: (2.45, 2.58)}


def error(codec: Codec, head_dim: int) -> tuple[float, float]:
    """Bounds of the expected |x - x'|^2 / |x|^2, or of E|x - x'|^2 / E|x|^2 where blocks are scaled."""
    bands, basis = codec.bands(head_dim), tables.basis_matrix(codec, head_dim)
    if codec.terms[-1].fit == "sign":
        # A residual of |r|^2 = D |x|^2 is rebuilt from signs; alone, they rebuild x itself.
        signs = sign_error(codec.terms[-1], basis[bands[-1]])
        if len(codec.terms) == 1:
            return signs, signs
        first = error_of_term(codec.terms[0], head_dim)
        # Nearly, because a residual is not quite isotropic in a sketch that is fixed.
        return first[0] * signs * 0.99, first[1] * signs * 1.01
    # Terms that share the channels out have that share of |x|^2 each.
    each = [error_of_term(term, band.stop - band.start) for term, band in zip(codec.terms, bands)]
    shares = [(band.stop - band.start) / head_dim for band in bands]
    # What no term has is lost.
    lost = 1 - sum(shares)
    return tuple(lost + sum(share * bound for share, bound in zip(shares, bounds)) for bounds in zip(*each))


def error_of_term(term: Term, coordinates: int) -> tuple[float, float]:
    """`error` of the coordinates that one term stands for."""
    if term.fit == "exact":
        return 0.0, 0.0
    if term.fit == "norm":
        distortion = tables.sphere_distortion(term.codes.plane.bits, coordinates)
        return distortion, distortion
    if term.fit == "sphere":
        # The scalar |x|^2 / <x, c> makes <x', x> = |x|^2: the error is D / (1 - D), less the part of it along x that
        # varies from vector to vector. The cells of a fine quantiser are wide in the tails (their error has the
        # density's cube root as its weight, of three times the variance), so that part is up to 3 / coordinates.
        distortion = tables.sphere_distortion(term.codes.plane.bits, coordinates)
        most = distortion / (1 - distortion)
        return most * (1 - 3 / coordinates), most
    if term.fit == "path":
        bits = term.codes.plane.bits
        gains = [tables.sphere_distortion(bits, coordinates) * 10 ** (-gain / 10) for gain in PATH_GAINS[bits]]
        assert min(gains) > 4.0**-bits, "nothing lies under the rate-distortion bound"
        return gains[1] / (1 - gains[1]) * (1 - 3 / coordinates), gains[0] / (1 - gains[0])
    if term.fit == "absmax":
        # A uniform error of one step for all of a block but its largest, which is a code exactly.
        block, limit = term.scale.plane.per, 2 ** (term.codes.plane.bits - 1) - 1
        largest = quad(lambda x: 2 * x * (1 - erf(x / math.sqrt(2)) ** block), 0, 12)[0]
        found = largest / limit**2 / 12 * (block - 1) / block
        return found, found
    if term.fit == "extreme":
        found = extreme_error(term.scale.plane.per, term.codes.plane.bits)
        return found, found
    if term.fit == "polar":
        found = 2 * (1 - polar_cosine(term))
        return found, found
    raise AssertionError(f"fit {term.fit!r} needs its theory here")


def extreme_error(block: int, bits: int) -> float:
    """E(x - x')^2 of normal numbers in blocks whose number of largest magnitude becomes the lowest code.

    Given the largest magnitude m the others are normal numbers cut off at m, in steps of m / 2^(bits - 1), rounded to
    the nearest code: integer numbers from the lowest, which no other reaches, to the highest, which lacks one.
    """
    low = 2 ** (bits - 1)

    def others(m: float) -> float:
        step, total = m / low, 0.0
        for code in range(-low, low):
            left = (code - 0.5) * step if code > -low else -m
            right = (code + 0.5) * step if code < low - 1 else m
            x = np.linspace(left, right, 41)
            total += np.trapezoid((x - code * step) ** 2 * norm.pdf(x), x)
        return total / erf(m / math.sqrt(2))

    def density(m: float) -> float:
        return block * erf(m / math.sqrt(2)) ** (block - 1) * 2 * norm.pdf(m)

    return (block - 1) / block * quad(lambda m: others(m) * density(m), 0.2, 8, limit=60, epsabs=1e-9)[0]


def sign_error(term: Term, sketch: torch.Tensor) -> float:
    """E|r - r'|^2 / |r|^2 of an isotropic r that is rebuilt from its norm and the signs of `sketch` r.

    r' = gain |r| S^T sign(S r): |r'|^2 needs E sign(s_i r) sign(s_j r) = 2 / pi asin(cos(s_i, s_j)), and <r, r'> needs
    E|s_i r| = |s_i| |r| E|u_1|.
    """
    rows, head_dim = sketch.shape
    gain, sketch = tables.sign_gain(term.basis, rows, head_dim), sketch.double()
    lengths = sketch.norm(dim=1)
    products = sketch @ sketch.T
    agreement = 2 / math.pi * torch.asin((products / torch.outer(lengths, lengths)).clamp(-1, 1))
    along = float(lengths.sum()) * mean_magnitude(head_dim)
    return float((products * agreement).sum()) * gain**2 - 2 * gain * along + 1


def sign_variance(term: Term, rows: int, q: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The variance of <q, r'> over random sketches of `rows` rows, for q and r [..., head_dim].

    A term of normal rows is sqrt(pi / 2) |r| <s, q> sign<s, r>, of second moment pi / 2 |q|^2 |r|^2. Of one orthonormal
    matrix S, r' = gain |r| S^T sign(S r) has the part gain |r| |S u|_1 along u = r / |r|, and the rest of its constant
    length lies evenly across it; E|S u|_1^2 = 1 + (head_dim - 1) 2 / pi. Several matrices are averaged.
    """
    head_dim = q.shape[-1]
    along = (q * r).sum(-1)
    if term.basis == "gaussian":
        return (math.pi / 2 * q.square().sum(-1) * r.square().sum(-1) - along**2) / rows
    gain = 1 / (head_dim * mean_magnitude(head_dim))
    square = r.square().sum(-1)
    across = q.square().sum(-1) * square - along**2
    of_length = along**2 * (gain**2 * (1 + 2 * (head_dim - 1) / math.pi) - 1)
    return (of_length + across * gain**2 * (1 - 2 / math.pi)) / (rows / head_dim)


def shrinkage(codec: Codec, head_dim: int) -> list[float]:
    """By which factor each term of a codec of random bases shrinks inner products on average."""
    found = []
    for term, band in zip(codec.terms, codec.bands(head_dim)):
        if term.fit == "norm":
            found.append(1 - tables.sphere_distortion(term.codes.plane.bits, band.stop - band.start))
        elif term.fit == "polar":
            found.append(polar_cosine(term))
        else:
            raise AssertionError(f"fit {term.fit!r} has no bias, or none that is known")
    return found
