"""One constructor a format, and the registry. The only file in which a format's name appears."""

import difflib
from functools import cache

from tqcompile.codec import Codec, Lookup, Plane, Term

WIDTHS = {"turboquant": (2, 3, 4, 5, 8)}


def identity() -> Codec:
    """The numbers themselves. Lossless: it separates the rewrite's errors from a codec's."""
    term = Term("standard", (Lookup(Plane("number", None), "native"),))
    return Codec("identity", (term,), "exact", unbiased=True, source="the tensor, unchanged")


def q8_0() -> Codec:
    """Blocks of 32 signed bytes with one float16 scale: 8.5 bits (llama.cpp)."""
    codes = Lookup(Plane("codes", 8), "signed")
    scale = Lookup(Plane("scale", 16, per=32), "half")
    return Codec("q8_0", (Term("standard", (scale, codes)),), "absmax", unbiased=False, source="llama.cpp Q8_0")


def turboquant(bits: int) -> Codec:
    """A rotated vector's nearest Lloyd-Max centroids, and one float16 scalar.

    The scalar is |x|^2 / <x, c>, which makes inner products unbiased at the same size (EDEN, arXiv 2108.08842).
    """
    codes = Lookup(Plane("codes", bits), "codebook")
    scale = Lookup(Plane("scale", 16, per=None), "half")
    return Codec(
        f"turboquant:{bits}",
        (Term("rotation", (scale, codes)),),
        "sphere",
        unbiased=True,
        source="arXiv 2504.19874, mse",
        minimum_head_dim=2,
    )


REGISTRY: dict[str, Codec] = {
    codec.name: codec for codec in (identity(), q8_0(), *(turboquant(bits) for bits in WIDTHS["turboquant"]))
}

# keys, values. Keys want more bits than values at every budget that was measured.
PRESETS: dict[str, tuple[str, str]] = {
    "balanced": ("turboquant:5", "turboquant:3"),
    "quality": ("q8_0", "q8_0"),
    "small": ("turboquant:4", "turboquant:2"),
    "lossless": ("identity", "identity"),
}


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
