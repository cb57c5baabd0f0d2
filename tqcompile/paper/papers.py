"""The figures of each paper that vectors and byte counts can check, and what ours are."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

from tqcompile import formats, tables
from tqcompile.codec import Codec
from tqcompile.layout import layout_of
from tqcompile.paper import theory
from tqcompile.paper.figure import Figure, Published
from tqcompile.paper.measure import Estimate, Sample

# The head_dim for which the papers count bits.
COUNTED_DIM = 128
BITS = (1, 2, 3, 4)
MSE = dict(zip(BITS, map(Published.digits, ("0.36", "0.117", "0.03", "0.009"))))
PROD = dict(zip(BITS, map(Published.digits, ("1.57", "0.56", "0.18", "0.047"))))
MSE_BOUND, PROD_BOUND = math.sqrt(3) * math.pi / 2, math.sqrt(3) * math.pi**2
UNBIASED, ORTHOGONAL = "the unbiased scalar", "rows of S orthogonal"
ROUNDED = dict.fromkeys(BITS, "") | {4: "made of D_mse at 3 bits as it is printed, 0.03 for 0.0345"}


@dataclass(frozen=True)
class Paper:
    """A paper, or a program, and its figures."""

    title: str
    figures: Callable[[Sample], Iterator[Figure]]


def bits_of(codec: Codec) -> Estimate:
    """Bits an element at the papers' head_dim, scalars included."""
    return Estimate(layout_of(codec, COUNTED_DIM, torch.float16, "cpu").bits_per_element)


def smaller(codec: Codec) -> Estimate:
    """How many times smaller it is than numbers of 16 bits."""
    return Estimate(16.0).over(bits_of(codec))


def bits_said(bits: int) -> str:
    """`1 bit`, `2 bits`."""
    return f"{bits} bit{'s' * (bits > 1)}"


def _norm(bits: int) -> Codec:
    return formats.turboquant(Fraction(bits), "norm")


def _mse_figures(sample: Sample) -> Iterator[Figure]:
    for bits in BITS:
        ours = sample.damage(_norm(bits)).distortion
        exact, limit = (tables.sphere_distortion(bits, dim) for dim in (sample.head_dim, theory.LARGE))
        yield Figure(f"D_mse, {bits_said(bits)}", "Theorem 1", "computed", MSE[bits], ours, exact, limit)
    for bits in BITS:
        ours, what = sample.damage(formats.turboquant(Fraction(bits))).distortion, f"D_mse, {bits_said(bits)}"
        yield Figure(f"{what}, {UNBIASED}", "Theorem 1", "computed", MSE[bits], ours, otherwise=UNBIASED)
    scaled = [sample.damage(_norm(bits)).distortion.times(4**bits) for bits in BITS]
    upper, lower = Published(MSE_BOUND, relation="<="), Published(1.0, relation=">=")
    yield Figure("4^b D_mse, largest of 1 to 4 bits", "Theorem 1", "bound", upper, max(scaled))
    yield Figure("4^b D_mse, smallest of 1 to 4 bits", "Theorem 3", "bound", lower, min(scaled))


def _bias_figures(sample: Sample) -> Iterator[Figure]:
    for bits in BITS:
        ours, exact = sample.damage(_norm(bits)).bias, -tables.sphere_distortion(bits, sample.head_dim)
        what = f"bias of <y, x>, mse, {bits_said(bits)}: -D_mse"
        if bits == 1:
            published = Published(2 / math.pi - 1)
            yield Figure(what, "text", "exact", published, ours, exact, published.value)
        else:
            yield Figure(what, "", "", None, ours, exact)
    for bits in BITS:
        ours = sample.damage(formats.turboquant(Fraction(bits))).bias
        what = f"bias of <y, x>, mse, {bits_said(bits)}, {UNBIASED}"
        yield Figure(what, "2108.08842", "exact", Published(0.0), ours, 0.0)


def _prod(bits: int, is_gaussian: bool) -> Codec:
    if is_gaussian:
        return formats.turboquant_prod(bits, "gaussian")
    return formats.turboquant_prod(bits) if bits > 1 else formats.qjl(1)


def _residual(bits: int, head_dim: int) -> float:
    """What the first stage of `bits` bits leaves."""
    return tables.sphere_distortion(bits, head_dim) if bits else 1.0


def _prod_figures(sample: Sample) -> Iterator[Figure]:
    dim = sample.head_dim
    for is_gaussian in (True, False):
        name, otherwise = ("Gaussian S", "") if is_gaussian else ("orthogonal S", ORTHOGONAL)
        for bits in BITS:
            what, published = f"d D_prod, {bits_said(bits)}, {name}", PROD[bits]
            if is_gaussian and bits == 1:
                # The signs alone: the codec of signs alone has orthogonal rows only.
                yield Figure(what, "Theorem 2", "computed", published, None, math.pi / 2 - 1 / dim, math.pi / 2)
                continue
            codec, left = _prod(bits, is_gaussian), _residual(bits - 1, dim)
            exact, ours = theory.signs(codec, dim)[1] * left, sample.damage(codec).product
            limit = math.pi / 2 * _residual(bits - 1, theory.LARGE) if is_gaussian else None
            spread = theory.gaussian_spread(dim)[1] * left if is_gaussian else 0.0
            yield Figure(what, "Theorem 2", "computed", published, ours, exact, limit, spread, otherwise, ROUNDED[bits])
    scaled = [sample.damage(_prod(bits, True)).product.times(4**bits) for bits in BITS[1:]]
    upper, lower = Published(PROD_BOUND, relation="<="), Published(1.0, relation=">=")
    yield Figure("4^b d D_prod, largest of 2 to 4 bits, Gaussian S", "Theorem 2", "bound", upper, max(scaled))
    yield Figure("4^b d D_prod, smallest of 2 to 4 bits, Gaussian S", "Theorem 3", "bound", lower, min(scaled))
    for bits in BITS[1:]:
        codec, left = _prod(bits, True), _residual(bits - 1, dim)
        bias, spread = theory.signs(codec, dim)[0] * left, theory.gaussian_spread(dim)[0] * left
        what, ours = f"bias of <y, x>, prod, {bits_said(bits)}, Gaussian S", sample.damage(codec).bias
        yield Figure(what, "Theorem 2", "exact", Published(0.0), ours, bias, 0.0, spread)


def _price_figures(sample: Sample) -> Iterator[Figure]:
    """What prod costs beside mse of the same bits; the papers' numbers are the ratios of two of theirs."""
    dim = sample.head_dim
    for is_gaussian in (True, False):
        name, otherwise = ("Gaussian S", "") if is_gaussian else ("orthogonal S", ORTHOGONAL)
        for bits in BITS[1:]:
            codec, published = _prod(bits, is_gaussian), PROD[bits].over(MSE[bits])
            ours = sample.damage(codec).product.over(sample.damage(_norm(bits)).distortion)
            before, after = _residual(bits - 1, dim), _residual(bits, dim)
            exact = theory.signs(codec, dim)[1] * before / after
            limit = math.pi / 2 * _residual(bits - 1, theory.LARGE) / _residual(bits, theory.LARGE)
            spread = theory.gaussian_spread(dim)[1] * before / after if is_gaussian else 0.0
            what = f"d D_prod / D_mse, {bits_said(bits)}, {name}"
            yield Figure(
                what, "Theorems 2, 1", "computed", published, ours, exact, limit, spread, otherwise, ROUNDED[bits]
            )


def _fraction_figures(sample: Sample) -> Iterator[Figure]:
    half, more = (formats.turboquant(Fraction(bits), "norm") for bits in ("2.5", "3.5"))
    codes = sum(term.share * term.codes.plane.bits for term in half.terms)
    said = Published(2.5)
    what, wrong = "bits: (32 x 3 + 96 x 2) / 128", "that is 2.25; with two float16 norms it is 2.5"
    yield Figure(what, "text", "counted", said, Estimate(float(codes)), because=wrong)
    yield Figure("bits of that, two float16 norms included", "Table 1", "counted", said, bits_of(half))
    yield Figure("bits of 32 channels at 4, 96 at 3, norms", "Table 1", "counted", Published(3.5), bits_of(more))
    for codec, name in ((half, "2.5"), (more, "3.5")):
        exact = theory.split_distortion(codec, sample.head_dim)
        yield Figure(f"D_mse, {name} bits, no outliers", "", "", None, sample.damage(codec).distortion, exact)
    for codec, name in ((half, "2.5 bits"), (more, "3.5 bits")):
        yield Figure(f"times smaller, {name}", "text", "claimed", Published(4.5, relation=">="), smaller(codec))
    what, claim, wrong = "times smaller, 3 bits", Published(6.0, relation=">="), "16 / 3 is 5.33, without any norm"
    yield Figure(what, "as announced", "claimed", claim, smaller(_norm(3)), because=wrong)


def _turboquant(sample: Sample) -> Iterator[Figure]:
    for part in (_mse_figures, _bias_figures, _prod_figures, _price_figures, _fraction_figures):
        yield from part(sample)


def _polar(sample: Sample) -> Iterator[Figure]:
    codec = formats.polarquant()
    cosine, damage = theory.polar_cosine(codec), sample.damage(codec)
    yield Figure("bits: 62 for 16 numbers", "text", "counted", Published(3.875), bits_of(codec))
    claim, wrong = Published(4.2, relation=">="), "16 / 3.875 is 4.13"
    yield Figure("times smaller", "abstract", "claimed", claim, smaller(codec), because=wrong)
    yield Figure("distortion", "", "", None, damage.distortion, 2 - 2 * cosine)
    yield Figure("bias of <y, x>: half of that", "", "", None, damage.bias, cosine - 1)


def _qjl(sample: Sample) -> Iterator[Figure]:
    dim = sample.head_dim
    yield Figure("bits of keys, m = 256", "text", "counted", Published(2.125), bits_of(formats.qjl(2)))
    for rows in (1, 2, 4):
        codec = formats.qjl(rows)
        bias, variance = theory.signs(codec, dim)
        ours, name = sample.damage(codec), f"m = {'' if rows == 1 else rows}d"
        bound = Published(math.pi / 2 / rows, relation="<=")
        yield Figure(f"bias of <y, x>, {name}", "Lemma 3.2", "exact", Published(0.0), ours.bias, bias)
        where = "2504.19874, Lemma 4"
        yield Figure(f"d times the variance, {name}", where, "bound", bound, ours.product, variance)


def _blocks(sample: Sample) -> Iterator[Figure]:
    for codec, size in ((formats.q8_0(), 34), (formats.q4_0(), 18)):
        what, published = f"bits of {codec.name}: {size} bytes for 32 numbers", Published(size * 8 / 32)
        yield Figure(what, "ggml-common.h", "counted", published, bits_of(codec))


PAPERS = (
    Paper("TurboQuant (arXiv 2504.19874)", _turboquant),
    Paper("PolarQuant (arXiv 2502.02617)", _polar),
    Paper("QJL (arXiv 2406.03482)", _qjl),
    Paper("llama.cpp", _blocks),
)
