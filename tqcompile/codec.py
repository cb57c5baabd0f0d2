"""The vocabulary every compressed format is written in.

A codec says that a vector of `head_dim` coordinates is a sum of terms, `x ~ sum basis^T (product of factors)`.
A factor is a look-up: a plane of stored codes, and the table that turns a code into a number.
Everything else (bytes, reference, kernel text, cache keys, the row in the docs) is derived from this one object.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

Table = Literal["codebook", "signed", "half", "native"]
Basis = Literal["standard", "rotation"]
Fit = Literal["exact", "absmax", "sphere"]


@dataclass(frozen=True)
class Plane:
    """One code of `bits` bits for every `per` coordinates; `per=None` is one code for the whole vector.

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

    def count(self, head_dim: int) -> int:
        """Codes this plane stores for one vector of `head_dim` coordinates."""
        return 1 if self.per is None else -(-head_dim // self.per)


@dataclass(frozen=True)
class Lookup:
    """How the codes of a plane become numbers.

    `codebook`: Lloyd-Max centroids of a coordinate on the sphere of radius sqrt(head_dim). `signed`: a
    two's-complement integer. `half`: the bits of a float16. `native`: the number itself.
    """

    plane: Plane
    table: Table


@dataclass(frozen=True)
class Term:
    """The product of `factors`, read in `basis`: `standard` is the model's own, `rotation` a random orthogonal one."""

    basis: Basis
    factors: tuple[Lookup, ...]


@dataclass(frozen=True)
class Codec:
    """A format for one of the two caches. Keys and values each have their own.

    `fit` names how an encoder chooses codes: `exact` stores the number, `absmax` scales a block to its largest
    magnitude, `sphere` normalises and takes the nearest centroid. `unbiased` promises that, averaged over the
    random basis, the inner product of any query with the decoded vector is the exact one.
    """

    name: str
    terms: tuple[Term, ...]
    fit: Fit
    unbiased: bool
    source: str
    minimum_head_dim: int = 1

    def __post_init__(self):
        names = [plane.name for plane in self.planes]
        if not names:
            raise ValueError(f"codec {self.name!r} has no planes")
        if len(set(names)) != len(names):
            raise ValueError(f"codec {self.name!r} names a plane twice: {names}")

    @property
    def planes(self) -> tuple[Plane, ...]:
        return tuple(factor.plane for term in self.terms for factor in term.factors)

    @property
    def codes(self) -> Lookup:
        """The look-up that holds one code a coordinate."""
        return next(factor for term in self.terms for factor in term.factors if factor.plane.per == 1)

    @property
    def scale(self) -> Lookup | None:
        """The look-up that multiplies a block or a whole vector; None where there is none."""
        return next((factor for term in self.terms for factor in term.factors if factor.plane.per != 1), None)

    @property
    def basis(self) -> Basis:
        return self.terms[0].basis

    def digest(self) -> str:
        """A name for this codec's content: equal exactly where every field is equal."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]
