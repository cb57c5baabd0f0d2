"""What codecs do to uniform unit vectors, in closed form or as integrals over one variable."""

import math

import numpy as np
import torch
from scipy.integrate import quad
from scipy.special import gammaln

from tqcompile import tables
from tqcompile.codec import Codec, Term

# A head_dim at which a coordinate on the sphere is as good as Gaussian.
LARGE = 2**16


def mean_magnitude(head_dim: int) -> float:
    """E|x_1| of a uniform unit vector x."""
    return float(np.exp(gammaln(head_dim / 2) - gammaln((head_dim + 1) / 2)) / np.sqrt(np.pi))


def split_distortion(codec: Codec, head_dim: int) -> float:
    """Distortion of terms that share the channels out: of a uniform unit vector each has its share of the energy."""
    bands = zip(codec.terms, codec.bands(head_dim))
    sizes = [(term.codes.plane.bits, band.stop - band.start) for term, band in bands]
    return sum(size / head_dim * tables.sphere_distortion(bits, size) for bits, size in sizes)


def signs(codec: Codec, head_dim: int) -> tuple[float, float]:
    """Bias and distortion of the last term of `codec`, signs of rows s_i, for what it is given, as a unit vector.

    For the matrix in use, averaged over vectors. With rho_ij the cosine between two rows, two signs agree with
    E[sign sign] = 2 / pi asin(rho_ij), and a row and its sign make E|<s_i, x>| = |s_i| E|x_1|.
    """
    term, band = codec.terms[-1], codec.bands(head_dim)[-1]
    rows = tables.basis_matrix(codec, head_dim, dtype=torch.float64)[band].numpy()
    gain, sizes = tables.sign_gain(term.basis, len(rows), head_dim), np.linalg.norm(rows, axis=1)
    gram = rows @ rows.T
    cosines = np.clip(gram / np.outer(sizes, sizes), -1, 1)
    # A row is exactly its own neighbour: asin is too steep there for rounded numbers.
    np.fill_diagonal(cosines, 1.0)
    energy = gain**2 * (gram * 2 / np.pi * np.arcsin(cosines)).sum()
    along = gain * sizes.sum() * mean_magnitude(head_dim)
    return float(along - 1), float(energy - 2 * along + 1)


def gaussian_spread(head_dim: int) -> tuple[float, float]:
    """Standard deviations of `signs` over draws of head_dim rows of normal numbers, to first order in 1 / head_dim.

    Of the bias: a row's size varies by 1 / sqrt(2 head_dim) of itself, and there are head_dim of them. Of the
    distortion two parts: pi / 2 of the energy goes with the mean square of those sizes, and 2 / head_dim is what the
    sum of squared cosines, two for each pair of rows, varies by. What the rest of the energy does, the bias undoes.
    """
    return math.sqrt(0.5) / head_dim, math.hypot(math.pi / math.sqrt(2), 2) / head_dim


def polar_cosine(codec: Codec | Term) -> float:
    """E<x, x'> of unit vectors x and x' in the polar codes of `codec`, whose radii are exact: |x'| = 1.

    A pair's inner product with its decoded twin is cos(psi) cos(psi') <u, u'> + sin(psi) sin(psi') <v, v'>, where u and
    v, the halves' directions, know nothing of psi: the levels' E cos(psi - psi') multiply. |x' - x|^2 is 2 - 2 <x, x'>.
    """
    cosine = 1.0
    for factor in codec.factors:
        if factor.table == "angle":
            cosine *= _angle_cosine(factor.plane.per.bit_length() - 1, factor.plane.bits)
    return cosine


def _angle_cosine(level: int, bits: int) -> float:
    codebook = tables.angles(level, bits)
    stop, power = (2 * math.pi, None) if level == 1 else (math.pi / 2, 2 ** (level - 1) - 1)
    edges = [0.0, *tables.boundaries(codebook), stop]

    def density(psi: float) -> float:
        return 1.0 if power is None else math.sin(2 * psi) ** power

    whole = quad(density, 0, stop)[0]
    cells = zip(codebook, edges, edges[1:])
    return sum(quad(lambda psi, a=a: math.cos(psi - a) * density(psi), low, high)[0] for a, low, high in cells) / whole
