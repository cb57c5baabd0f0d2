"""The codecs that tests which compile, or interpret kernels, run over; cheap ones run over the whole registry.

One codec of each kind of terms stands for the others of its kind, which differ in bits and in nothing that is printed
or compiled another way. Rotated codebooks are read by kernels that are printed for their bits: each of the widths that
a preset or a user is likely to take has its own.
"""

from collections.abc import Collection

from tqcompile.codec import Codec, Term
from tqcompile.formats import REGISTRY

WIDTHS = (2, 3, 4, 5, 8)


def kind_of(codec: Codec) -> tuple:
    """What decides which code encodes, decodes, reads and writes a codec."""
    bits = codec.codes.plane.bits if codec.is_plain and codec.unbiased else None
    whole = sum(term.share for term in codec.terms) >= 1
    return tuple(map(_kind_of_term, codec.terms)), bits if bits in WIDTHS else None, codec.principal, whole


def _kind_of_term(term: Term) -> tuple:
    # Terms that share the channels out are fitted one by one, as whole codecs are, and read the same whatever the fit.
    part = "part" if term.share < 1 else "whole" if term.share == 1 else "several"
    return term.fit if part != "part" else term.codes.table, term.basis, part


def every_pair(first: Collection, second: Collection, third: Collection) -> list[tuple]:
    """Cases of three axes in which each two values of two axes meet, and not each three.

    Raises ValueError where the third axis has more values than another, some of which it would not meet.
    """
    if len(third) > min(len(first), len(second)):
        raise ValueError(f"the third axis has {len(third)} values, more than another: put the longest first")
    third = list(third)
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


REPRESENTATIVES = list({kind_of(codec): codec.name for codec in reversed(REGISTRY.values())}.values())[::-1]
# Without those in bases of their own, which are no codes of what a dense cache holds: `test_principal_models.py` has
# models whose caches they are.
OF_DENSE = [name for name in REPRESENTATIVES if not REGISTRY[name].principal]
