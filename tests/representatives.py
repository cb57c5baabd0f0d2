"""The codecs that tests which compile, or interpret kernels, run over; cheap ones run over the whole registry.

One codec of each kind of terms stands for the others of its kind, which differ in bits and in nothing that is printed
or compiled another way. Rotated codebooks are read by kernels that are printed for their bits: each of the widths that a
preset or a user is likely to take has its own.
"""

from tqcompile.codec import Codec
from tqcompile.formats import REGISTRY

WIDTHS = (2, 3, 4, 5, 8)


def kind_of(codec: Codec) -> tuple:
    """What decides which code encodes, decodes, reads and writes a codec."""
    bits = codec.codes.plane.bits if codec.is_plain and codec.unbiased else None
    terms = tuple((term.fit, term.basis, term.share) for term in codec.terms)
    return terms, bits if bits in WIDTHS else None


def _first_of_each(kind) -> list[Codec]:
    found: dict = {}
    for codec in REGISTRY.values():
        found.setdefault(kind(codec), codec)
    return list(found.values())


REPRESENTATIVES = [codec.name for codec in _first_of_each(kind_of)]
