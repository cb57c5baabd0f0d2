"""The systems that `frontier.py` compares: rivals as published, and candidates of this project."""

from coders import (
    Coder,
    exact,
    kivi_keys,
    kivi_values,
    norm_corrected,
    q4_0,
    q8_0,
    turboquant,
    uniform_vectors,
    with_hadamard,
)
from simulated import System

BUDGETS = (4.3, 3.3, 2.5)
KIVI_WINDOW = 128
VLLM_LAYERS = 2


def system(keys: Coder, values: Coder, name: str = "", **tricks) -> System:
    """A System with a name that says what is in it."""
    said = name or (keys.name if keys.name == values.name and keys.name in ("q8_0",) else f"{keys.name}/{values.name}")
    for trick, text in (
        ("centre", " centre-{}"),
        ("balance", " balance"),
        ("value_mean", " vmean"),
        ("sinks", " sinks{}"),
        ("window", " window{}"),
    ):
        if tricks.get(trick) and not (name and trick == "window"):
            said += text.format(tricks[trick])
    return System(said, keys, values, **tricks)


def tq(keys: int, values: int, scale_bits: int = 16, **tricks) -> System:
    return system(turboquant(keys, scale_bits), turboquant(values, scale_bits), **tricks)


def rivals() -> list[System]:
    """Plain TurboQuant and what other programs do, and the same with centred keys."""
    mixes = [(bits, bits) for bits in range(1, 9)] + [(5, 4), (5, 3), (4, 3), (4, 2), (3, 4), (3, 2)]
    rotated = with_hadamard(q4_0())
    published = [
        (q8_0(), q8_0(), "q8_0", {}),
        (q4_0(), q4_0(), "q4_0", {}),
        (rotated, rotated, "q4_0+Hadamard", {}),
        (norm_corrected(4), uniform_vectors(4), "vLLM 4bit_nc", {"exact_layers": VLLM_LAYERS}),
        (norm_corrected(3), uniform_vectors(4), "vLLM k3v4_nc", {"exact_layers": VLLM_LAYERS}),
        (norm_corrected(3), uniform_vectors(3), "vLLM 3bit_nc", {"exact_layers": VLLM_LAYERS}),
        (kivi_keys(4), kivi_values(4), "KIVI 4", {"window": KIVI_WINDOW}),
        (kivi_keys(2), kivi_values(2), "KIVI 2", {"window": KIVI_WINDOW}),
    ]
    return [
        *(tq(*pair, rival=True) for pair in mixes),
        *(system(k, v, name, rival=True, **tricks) for k, v, name, tricks in published),
        *(system(k, v, name, rival=True, centre="before", **tricks) for k, v, name, tricks in published[1:]),
    ]


# The two tricks on keys together, and the first token in 16 bits: a sink's key is far from the mean of all others.
TRICKS = {"centre": "before", "balance": True, "sinks": 1}


def ablations() -> list[System]:
    """One trick at a time, and together, at 4/4, 4/2 and 3/3."""
    return [
        tq(*pair, **tricks)
        for pair in ((4, 4), (4, 2), (3, 3))
        for tricks in (
            {"centre": "after"},
            {"centre": "before"},
            {"balance": True},
            {"value_mean": True},
            {"sinks": 1},
            {"sinks": 4},
            {"window": 32},
            {"window": 128},
            {"centre": "before", "balance": True},
            {"centre": "before", "sinks": 1},
            {"centre": "before", "sinks": 4},
            {"centre": "after", "balance": True, "sinks": 1},
            TRICKS,
        )
    ]


def candidates() -> list[System]:
    """Mixes with centred and balanced keys and one sink, scales in 16 and in 8 bits."""
    mixes = ((6, 4), (5, 5), (5, 4), (4, 5), (5, 3), (4, 4), (4, 3), (3, 4), (4, 2), (3, 3), (3, 2), (2, 3), (2, 2))
    plain = [tq(*mix, bits, **TRICKS) for mix in mixes for bits in (16, 8)]
    return plain + [tq(*mix, 8, **TRICKS, window=16) for mix in ((3, 3), (3, 2), (2, 3), (2, 2))]


def long_systems() -> list[System]:
    """At long contexts a window costs little."""
    rival = {"2/2", "3/3", "4/4", "q4_0+Hadamard", "KIVI 2", "KIVI 4", "KIVI 2 centre-before"}
    return [
        *(one for one in rivals() if one.name in rival),
        tq(2, 2, window=32),
        tq(2, 2, **TRICKS),
        *(tq(2, 2, 8, **TRICKS, window=window) for window in (0, 16, 32, 64)),
        tq(2, 3, 8, **TRICKS),
        tq(3, 2, 8, **TRICKS),
        tq(3, 3, 8, **TRICKS, window=32),
    ]


def systems(part: str) -> list[System]:
    """Each system of a part once, by name."""
    listed = long_systems() if part == "long" else [*rivals(), *ablations(), *candidates(), system(exact(), exact())]
    return list({one.name: one for one in listed}.values())


def biased() -> list[System]:
    """4-bit keys, what a model with key biases is asked for."""
    return [
        tq(4, 4),
        tq(4, 4, centre="after"),
        tq(4, 4, centre="before"),
        tq(4, 4, 8, **TRICKS),
        system(with_hadamard(q4_0()), with_hadamard(q4_0()), "q4_0+Hadamard"),
    ]
