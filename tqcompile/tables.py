"""Every number a format needs, derived from its definition: bases, Lloyd-Max codebooks, the numbers of a trellis."""

from functools import cache
from itertools import pairwise

import numpy as np
import torch
from scipy.linalg import hadamard
from scipy.optimize import root
from scipy.special import betainc, betaincinv, gammaln, ndtri

from tqcompile.codec import STATE_BITS, Basis, Codec, Lookup

ROTATION_SEED = 2504_19874
SKETCH_SEED = 2406_03482
TRELLIS_SEED = 2406_11235
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
    """The rows of the bases of a codec's terms, in order, [coordinates, head_dim]; None for the model's own basis."""
    if all(term.basis == "standard" and term.share == 1 for term in codec.terms):
        return None
    rows, left = [], np.arange(head_dim)
    for term, band in zip(codec.terms, codec.bands(head_dim)):
        count, channels = band.stop - band.start, np.arange(head_dim)
        if term.share < 1:
            channels = left[:count] if codec.principal else left[np.arange(count) * len(left) // count]
            left = np.setdiff1d(left, channels)
        part = torch.zeros(count, head_dim, dtype=torch.float32, device="cpu")
        part[:, channels] = BASES[term.basis](count, len(channels))
        rows.append(part)
    return torch.cat(rows).to(device, dtype)


@cache
def overlap(codec: Codec, head_dim: int, first: int, second: int) -> tuple[tuple[float, ...], ...]:
    """What term `second` sees of a vector that term `first` makes: [coordinates of first][coordinates of second]."""
    bands, basis = codec.bands(head_dim), basis_matrix(codec, head_dim, dtype=torch.float64).numpy()
    return tuple(map(tuple, (basis[bands[first]] @ basis[bands[second]].T).tolist()))


def prepare(codec: Codec, head_dim: int) -> None:
    """Make what a graph that encodes takes for constants, before anything traces it."""
    for place, term in enumerate(codec.terms):
        for earlier in range(place if term.share >= 1 else 0):
            overlap(codec, head_dim, earlier, place)


def _hadamard(rows: int, columns: int) -> torch.Tensor:
    """Sylvester's matrix, orthonormal, in blocks of the largest power of two that divides `columns`."""
    size = columns & -columns
    return torch.block_diag(*[torch.from_numpy(hadamard(size) / np.sqrt(size)).float()] * (columns // size))


def _sketch(rows: int, columns: int) -> torch.Tensor:
    return torch.cat([rotation(columns, SKETCH_SEED + place) for place in range(rows // columns)])


def _gaussian(rows: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng((SKETCH_SEED, rows, columns)).standard_normal((rows, columns))
    ).float()


BASES = {
    "standard": lambda rows, columns: torch.eye(rows, dtype=torch.float32, device="cpu"),
    "rotation": lambda rows, columns: rotation(columns),
    "hadamard": _hadamard,
    "sketch": _sketch,
    "gaussian": _gaussian,
}


def sign_gain(basis: Basis, rows: int, head_dim: int) -> float:
    """What |x| sum_i s_i sign(<s_i, x>), over `rows` rows s_i, is multiplied by to be x on average.

    QJL (arXiv 2406.03482, eq. 3) for Gaussian rows; for rows on the unit sphere, 1 / (rows E|s_1|).
    """
    if basis == "gaussian":
        return float(np.sqrt(np.pi / 2) / rows)
    return float(np.sqrt(np.pi) * np.exp(gammaln((head_dim + 1) / 2) - gammaln(head_dim / 2)) / rows)


@cache
def angles(level: int, bits: int) -> tuple[float, ...]:
    """Lloyd-Max centroids of the angle at a level of the polar transform of a Gaussian vector, ascending, in radians.

    At level 1 the angle of two coordinates is uniform on [0, 2 pi). Above, that of two radii lies on [0, pi / 2] with
    density ~ sin(2 psi)^(2^(level - 1) - 1) (PolarQuant, arXiv 2502.02617, lemma 2).
    """
    count = 2**bits
    if level == 1:
        return tuple(float(a) for a in (np.arange(count) + 0.5) * 2 * np.pi / count)
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def means(centroids: np.ndarray) -> np.ndarray:
        edges = np.concatenate([[0.0], (centroids[1:] + centroids[:-1]) / 2, [np.pi / 2]])
        middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
        psi = middle[:, None] + half[:, None] * nodes
        density = np.sin(2 * psi) ** (2 ** (level - 1) - 1) * weights
        return (psi * density).sum(1) / density.sum(1)

    start = np.pi / 4 + (np.arange(count) - (count - 1) / 2) * 1.2 / (count * 2 ** (level / 2 - 1))
    solution = root(lambda c: means(c) - c, start, tol=1e-13)
    assert np.abs(means(solution.x) - solution.x).max() < 1e-9, f"no codebook of angles at level {level}, {bits} bits"
    return tuple(float(a) for a in solution.x)


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
def trellis(bits: int) -> tuple[float, ...]:
    """The number of each state of a bitshift trellis that takes in `bits` bits a step.

    Midpoints of equal shares of a normal coordinate, in random order (QTIP, arXiv 2406.11235, "pure lookup"), but for
    one thing: of the states that follow one state, and of those that one state may follow, each has its number in
    another of 2^bits equal ranges. That gains 0.1 to 0.7 dB over an order that is random alone.
    """
    state, count = np.arange(2**STATE_BITS), 2**bits
    part, rank = (state + (state >> (STATE_BITS - bits))) % count, np.empty(2**STATE_BITS)
    draw = np.random.default_rng((TRELLIS_SEED, bits))
    for each in range(count):
        rank[part == each] = draw.permutation(len(state) // count) + each * len(state) // count
    return tuple(float(number) for number in ndtri((rank + 0.5) / len(state)))


@cache
def numbers(lookup: Lookup, coordinates: int) -> tuple[float, ...]:
    """The table of a look-up that has one, in order of the code or state; of angles, cosine and sine."""
    if lookup.table == "trellis":
        return trellis(lookup.plane.bits)
    if lookup.table == "angle":
        found = angles(lookup.plane.per.bit_length() - 1, lookup.plane.bits)
        return tuple(float(number) for angle in found for number in (np.cos(angle), np.sin(angle)))
    whole, bits = integers(lookup, coordinates), lookup.plane.bits
    if whole is not None:
        return tuple(place * whole[1] for place in whole[0])
    coefficients = polynomial(lookup, coordinates)
    if coefficients is None:
        return sphere_codebook(bits, coordinates)
    x = np.arange(2**bits) - (2**bits - 1) / 2
    return tuple(float(c) for c in sum(a * x ** (2 * i + 1) for i, a in enumerate(coefficients)))


def tabled(codec: Codec) -> tuple[Lookup, ...]:
    """The look-ups of a codec that take numbers from a table."""
    return tuple(factor for factor in codec.factors if factor.table in ("codebook", "trellis", "angle"))


@cache
def table_offsets(codec: Codec, head_dim: int) -> dict[str, int]:
    """Where the table of each plane begins, in the tables of a codec laid end to end."""
    lengths = [len(numbers(factor, coordinates)) for factor, coordinates in _sized(codec, head_dim)]
    return dict(zip((factor.plane.name for factor in tabled(codec)), np.cumsum([0, *lengths]).tolist()))


@cache
def all_numbers(codec: Codec, head_dim: int) -> tuple[float, ...]:
    """The tables of a codec's look-ups, end to end; one unused zero where there are none."""
    found = [numbers(factor, coordinates) for factor, coordinates in _sized(codec, head_dim)]
    return tuple(number for each in found for number in each) or (0.0,)


def _sized(codec: Codec, head_dim: int) -> list[tuple[Lookup, int]]:
    counts = [band.stop - band.start for band in codec.bands(head_dim)]
    pairs = [(factor, count) for term, count in zip(codec.terms, counts) for factor in term.factors]
    return [(factor, count) for factor, count in pairs if factor in tabled(codec)]


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
