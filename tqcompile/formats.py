"""One constructor a format, and the registry. The only file in which a format's name appears."""

import difflib
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from tqcompile.allocation import SPECTRUM, allocate
from tqcompile.codec import Basis, Codec, Lookup, Plane, Term

# Of head_dim, what the papers' fractional settings give one bit more: 32 of 128.
OUTLIERS = Fraction(1, 4)
# Bits of the shortest path round a trellis of ten bits: shorter ones have too few to choose.
LEAST_PATH = 16


def identity() -> Codec:
    """The numbers themselves. Lossless: it separates the rewrite's errors from a codec's."""
    term = Term("standard", (Lookup(Plane("number", None), "native"),), "exact")
    return Codec("identity", (term,), unbiased=True, source="the tensor, unchanged")


def q8_0() -> Codec:
    """Blocks of 32 signed bytes with one float16 scale: 8.5 bits (llama.cpp)."""
    factors = Lookup(Plane("scale", 16, per=32), "half"), Lookup(Plane("codes", 8), "signed")
    return Codec("q8_0", (Term("standard", factors, "absmax"),), unbiased=False, source="llama.cpp Q8_0")


def q4_0(basis: Basis = "standard") -> Codec:
    """Blocks of 32 codes of four bits, -8 to 7, with one float16 scale: 4.5 bits (llama.cpp), rotated or not."""
    factors = Lookup(Plane("scale", 16, per=32), "half"), Lookup(Plane("codes", 4), "signed")
    name = "q4_0" if basis == "standard" else f"q4_0:{basis}"
    return Codec(name, (Term(basis, factors, "extreme"),), unbiased=False, source="llama.cpp Q4_0")


def _sphere(bits: int, place: str = "", share: Fraction = Fraction(1), fit: str = "sphere") -> Term:
    factors = Lookup(Plane(f"scale{place}", 16, per=None), "half"), Lookup(Plane(f"codes{place}", bits), "codebook")
    return Term("rotation", factors, fit, share)


def turboquant(bits: Fraction, scalar: str = "") -> Codec:
    """A rotated vector's nearest Lloyd-Max centroids, and one float16 scalar.

    The scalar is |x|^2 / <x, c>, which makes inner products unbiased at the same size (EDEN, arXiv 2108.08842), or,
    with `scalar="norm"`, the paper's |x|. A fraction of a bit gives a quarter of the channels one bit more than the
    others, in two independent instances; channels are spread evenly, because nothing is known of them beforehand.
    """
    whole, fit = int(bits), scalar or "sphere"
    if whole == bits:
        terms = (_sphere(whole, fit=fit),)
    else:
        terms = _sphere(whole + 1, "_outliers", OUTLIERS, fit), _sphere(whole, "_others", 1 - OUTLIERS, fit)
    name = f"turboquant:{whole if whole == bits else float(bits)}{f':{scalar}' * bool(scalar)}"
    least = 2 if whole == bits else 8
    return Codec(name, terms, unbiased=not scalar, source="arXiv 2504.19874, mse", minimum_head_dim=least)


def trellis(bits: int) -> Codec:
    """A rotated vector's path through a bitshift trellis that bites its tail, and the scalar of `turboquant`.

    As many bits as Lloyd-Max codes take, and nearer to what any code of so many bits can do; slower to encode. A narrow
    vector has few closed paths, of which the best may be further away than Lloyd-Max codes are.
    """
    factors = Lookup(Plane("scale", 16, per=None), "half"), Lookup(Plane("codes", bits), "trellis")
    least, source = -(-LEAST_PATH // bits), "arXiv 2406.11235, codes"
    name, terms = f"turboquant:{bits}:trellis", (Term("rotation", factors, "path"),)
    return Codec(name, terms, unbiased=True, source=source, minimum_head_dim=least)


def _signs(basis: Basis, share: int = 1) -> Term:
    factors = Lookup(Plane("norm", 16, per=None), "half"), Lookup(Plane("signs", 1), "sign")
    return Term(basis, factors, "sign", Fraction(share))


def turboquant_prod(bits: int, basis: Basis = "sketch") -> Codec:
    """One bit less of `turboquant` with the norm as its scalar, and signs of a sketch of what that leaves.

    The sketch's rows are orthogonal, or with `basis="gaussian"` independent normal numbers as in the paper.
    """
    name = f"turboquant_prod:{bits}" + (f":{basis}" if basis != "sketch" else "")
    terms = _sphere(bits - 1, fit="norm"), _signs(basis)
    return Codec(name, terms, unbiased=True, source="arXiv 2504.19874, prod", minimum_head_dim=2)


def qjl(rows: int) -> Codec:
    """Signs of `rows` * head_dim orthogonalised random projections, and the norm; keys only."""
    term, source = _signs("sketch", rows), "arXiv 2406.03482"
    return Codec(f"qjl:{rows}", (term,), unbiased=True, source=source, minimum_head_dim=2, for_values=False)


def polarquant() -> Codec:
    """A rotated vector in recursive polar coordinates: four levels of angles at 4, 2, 2 and 2 bits, radii of 16."""
    angles = tuple(
        Lookup(Plane(f"angles_{2**level}", 4 if level == 1 else 2, 2**level), "angle") for level in (1, 2, 3, 4)
    )
    factors = Lookup(Plane("radius", 16, per=16), "half"), *angles
    return Codec("polarquant", (Term("rotation", factors, "polar"),), unbiased=False, source="arXiv 2502.02617")


def kvtc(bits: int) -> Codec:
    """Principal components in bands, each rotated, with its own width of Lloyd-Max codes and its own float16 scalar.

    `bits` a coordinate at 128 dims, scalars included; which band has how many is `allocation.allocate`'s word. What
    has no bits is left out. The basis is that of the cache's first tokens, a sequence and head at a time.
    """
    runs = [(Fraction(bands, len(SPECTRUM)), width) for bands, width in allocate(bits * len(SPECTRUM)) if width]
    terms = tuple(_sphere(width, f"_{place}", share) for place, (share, width) in enumerate(runs))
    whole, least = sum(term.share for term in terms) == 1, 2 * len(SPECTRUM)
    options = {"minimum_head_dim": least, "principal": True}
    return Codec(f"kvtc:{bits}", terms, unbiased=whole, source="arXiv 2511.01815, resident", **options)


REGISTRY: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        identity(),
        q8_0(),
        q4_0(),
        q4_0("hadamard"),
        *(turboquant(Fraction(bits)) for bits in (1, 2, "2.5", 3, "3.5", 4, 5, 6, 7, 8)),
        *(turboquant(Fraction(bits), "norm") for bits in (1, 2, "2.5", 3, "3.5", 4)),
        *(trellis(bits) for bits in (2, 3, 4)),
        *(turboquant_prod(bits) for bits in (2, 3, 4, 5)),
        turboquant_prod(4, "gaussian"),
        *(qjl(rows) for rows in (1, 2, 4)),
        polarquant(),
        *(kvtc(bits) for bits in (1, 2, 3, 4)),
    )
}

# What values can be kept in: the others serve products with a query alone.
FOR_VALUES = tuple(name for name, codec in REGISTRY.items() if codec.for_values)


@dataclass(frozen=True)
class Preset:
    """How caches are kept: the codecs of keys and of values by name, how many of the first and last tokens are kept as
    they are beside their codes, and whether keys are centred.
    """

    keys: str
    values: str
    sinks: int = 0
    window: int = 0
    centre: bool = False

    @property
    def pair(self) -> tuple[str, str]:
        return self.keys, self.values

    @property
    def extras(self) -> str:
        """In words what it has beside codecs; nothing where that is nothing."""
        exact = [f"{which} {count}" for which, count in (("first", self.sinks), ("last", self.window)) if count]
        return ", ".join([f"{' and '.join(exact)} tokens exact"] * bool(exact) + ["keys centred"] * self.centre)


# Keys want more bits than values at every budget that was measured. Where bits are few, what is kept exactly and
# centring gain more than bits would, and cost a step more than codes alone (docs/gpu.md): the default has neither.
PRESETS: dict[str, Preset] = {
    "balanced": Preset("turboquant:5", "turboquant:3"),
    "quality": Preset("q8_0", "q8_0"),
    "small": Preset("turboquant:3", "turboquant:2", sinks=4, window=64, centre=True),
    "tiny": Preset("turboquant:2", "turboquant:2", sinks=4, window=64, centre=True),
    "lossless": Preset("identity", "identity"),
}
DEFAULT = "balanced"


@cache
def codec(name: str) -> Codec:
    """The codec called `name`.

    Raises:
        ValueError: no such codec; the message lists those that exist and the nearest one.
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(str(name), REGISTRY, n=1, cutoff=0.0)[0]
        raise ValueError(f"codec {name!r} does not exist; did you mean {near!r}? Codecs: {', '.join(REGISTRY)}")
    return REGISTRY[name]


def check_values(name: str) -> None:
    """Raise unless the codec called `name` can keep values.

    Raises:
        ValueError: no such codec, or it serves keys alone.
    """
    if not codec(name).for_values:
        raise ValueError(
            f"codec {name!r} serves keys alone: it keeps inner products on average, and vectors badly; give it for "
            f"keys, and for values one of: {', '.join(FOR_VALUES)}"
        )


def pair_of(name: str) -> tuple[str, str]:
    """The codec called `name` for keys and values, or beside the default's values where it serves keys alone."""
    return name, name if codec(name).for_values else PRESETS[DEFAULT].values
