"""The vocabulary every compressed format is written in.

A codec says that a vector of `head_dim` coordinates is a sum of terms, `x ~ sum basis^T (product of factors)`.
A factor is a look-up: a plane of stored codes, and the table that turns a code into a number. A term is fitted to
what the terms before it leave of the vector. Everything else (bytes, reference, kernel text, cache keys, the row in
the docs) is derived from this one object.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Literal

Table = Literal["codebook", "trellis", "signed", "sign", "angle", "half", "native"]
Basis = Literal["standard", "rotation", "hadamard", "sketch", "gaussian"]
Fit = Literal["exact", "absmax", "extreme", "sphere", "norm", "path", "sign", "polar"]

# Bits of a trellis' state, each of which has a number of its own.
STATE_BITS = 10

# The tensor of a cache in which planes of a table lie, side by side: codes share bytes, scalars do not.
STORES = {"half": "scale", "native": "number"}


@dataclass(frozen=True)
class Plane:
    """One code of `bits` bits for every `per` coordinates; `per=None` is one code for the whole term.

    `bits=None` stores numbers in the dtype of the tensor that is compressed.
    """

    name: str
    bits: int | None
    per: int | None = 1

    def __post_init__(self):
        if self.bits is not None and not 1 <= self.bits <= 16:
            raise ValueError(
                f"plane {self.name!r}: bits={self.bits}; allowed are 1 to 16, or None for the tensor's dtype"
            )
        if self.per is not None and self.per < 1:
            raise ValueError(f"plane {self.name!r}: per={self.per}; allowed are positive counts, or None for a vector")

    def count(self, coordinates: int) -> int:
        """Codes this plane stores for a term of so many coordinates."""
        return 1 if self.per is None else -(-coordinates // self.per)


@dataclass(frozen=True)
class Lookup:
    """How the codes of a plane become numbers.

    `codebook`: Lloyd-Max centroids of a coordinate on the sphere of radius sqrt(coordinates). `trellis`: the number of
    a state, the lowest `STATE_BITS` bits of a coordinate's code and those of the next ones, put one behind the other;
    the first coordinate is next to the last (QTIP, arXiv 2406.11235). `signed`: a two's-complement integer. `sign`: -1
    or 1. `angle`: of an angle, the cosine for the first half of the plane's `per` coordinates and the sine for the
    second. `half`: the bits of a float16. `native`: the number itself.
    """

    plane: Plane
    table: Table

    @cached_property
    def store(self) -> str:
        """The tensor that this look-up's codes lie in."""
        return STORES.get(self.table, "codes")


@dataclass(frozen=True)
class Term:
    """The product of `factors`, read in `basis`.

    `standard` is the model's own basis, `rotation` a random orthogonal one, `hadamard` Sylvester's matrix in blocks,
    `sketch` rows of random orthogonal matrices, one below the other, and `gaussian` as many of independent normal
    numbers. `share` is the number of coordinates over head_dim: under 1 the terms share the channels out.

    `fit` names how an encoder chooses codes: `exact` stores the number, `absmax` scales a block to its largest
    magnitude, `extreme` to its number of largest magnitude, which becomes the lowest code, `sphere` normalises, takes
    the nearest centroid and the scalar that leaves inner products unbiased, `norm` the same with the norm for a scalar,
    `path` as `sphere` with a trellis in place of centroids, whose codes are chosen together, `sign` keeps signs and the
    norm, `polar` angles of pairs, of pairs of their radii, and so on, and the last radius.
    """

    basis: Basis
    factors: tuple[Lookup, ...]
    fit: Fit
    share: Fraction = Fraction(1)

    @cached_property
    def codes(self) -> Lookup:
        """The first look-up of codes."""
        return next(factor for factor in self.factors if factor.store != "scale")

    @cached_property
    def scale(self) -> Lookup | None:
        """The look-up that multiplies a block or a whole term; None where there is none."""
        return next((factor for factor in self.factors if factor.store == "scale"), None)

    @cached_property
    def is_plain(self) -> bool:
        """Whether a coordinate has one code, which alone says its number, and at most a scalar beside it."""
        alone = self.codes.plane.per == 1 and self.codes.table != "trellis"
        return alone and len(self.factors) == 1 + (self.scale is not None)


@dataclass(frozen=True)
class Codec:
    """A format for one of the two caches. Keys and values each have their own.

    `unbiased` promises that, averaged over the random basis, the inner product of any query with the decoded vector is
    the exact one. `minimum_head_dim` is the smallest vector that it is defined for; `for_values` tells whether decoded
    vectors are good for anything but products with a query. `principal` codecs are for vectors whose coordinates are
    the principal components of a cache's first tokens, those of the largest variance first (`tqcompile.principal`):
    their terms take neighbouring coordinates, and none takes the last ones where shares are under 1 together.
    """

    name: str
    terms: tuple[Term, ...]
    unbiased: bool
    source: str
    minimum_head_dim: int = 1
    for_values: bool = True
    principal: bool = False

    def __post_init__(self):
        names = [plane.name for plane in self.planes]
        if not names:
            raise ValueError(f"codec {self.name!r} has no planes")
        if len(set(names)) != len(names):
            raise ValueError(f"codec {self.name!r} names a plane twice: {names}")

    def __hash__(self) -> int:
        # Every call of a kernel looks a codec up, and the hash of all fields takes longer than the rest of that.
        return hash(self.name)

    @cached_property
    def factors(self) -> tuple[Lookup, ...]:
        return tuple(factor for term in self.terms for factor in term.factors)

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        return tuple(factor.plane for factor in self.factors)

    @cached_property
    def stores(self) -> tuple[str, ...]:
        """Names of the tensors that a cache consists of: `scale` and `codes`, or `number`."""
        return tuple(dict.fromkeys(factor.store for factor in self.factors))

    @cache  # noqa: B019 - codecs are few, and stay
    def bands(self, head_dim: int) -> tuple[slice, ...]:
        """The coordinates of each term, among those of all terms one behind the other."""
        # By their sum alone, where some coordinates have no term: two head sizes of one sum are cut alike.
        whole = sum(term.share for term in self.terms)
        edges = accumulate((term.share / whole * round(whole * head_dim) for term in self.terms), initial=Fraction(0))
        return tuple(slice(round(start), round(stop)) for start, stop in pairwise(edges))

    def coordinates(self, head_dim: int) -> int:
        """Numbers that a vector of `head_dim` coordinates is decoded to, in the bases of all terms."""
        return self.bands(head_dim)[-1].stop

    @cache  # noqa: B019 - codecs are few, and stay
    def head_dim(self, coordinates: int) -> int:
        """The inverse of `coordinates`: of those that have so many, where several do, one."""
        return round(coordinates / sum(term.share for term in self.terms))

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is one term of one number a coordinate and at most a scalar."""
        term = self.terms[0]
        return len(self.terms) == 1 and term.share == 1 and term.is_plain and term.codes.table != "sign"

    @cached_property
    def is_exact(self) -> bool:
        """Whether it stores the numbers themselves."""
        return self.terms[0].fit == "exact"

    @cached_property
    def is_sequential(self) -> bool:
        """Whether a code is chosen by those before it: then encoding is a long program, which no graph should hold."""
        return any(term.fit == "path" for term in self.terms)

    @cached_property
    def codes(self) -> Lookup:
        """The look-up of a plain codec that holds one code a coordinate."""
        assert self.is_plain, f"{self.name} has no one plane of codes"
        return self.terms[0].codes

    @cached_property
    def scale(self) -> Lookup | None:
        """The look-up of a plain codec that multiplies a block or a whole vector; None where there is none."""
        assert self.is_plain, f"{self.name} has no one scale"
        return self.terms[0].scale

    @cached_property
    def basis(self) -> str:
        """A name of all bases: equal where the matrices are, for one head_dim."""
        names = [term.basis if term.share == 1 else f"{term.basis}_{term.share}" for term in self.terms]
        return "_".join(["principal"] * self.principal + names).replace("/", "_")

    def digest(self) -> str:
        """A name for this codec's content: equal exactly where every field is equal."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]
