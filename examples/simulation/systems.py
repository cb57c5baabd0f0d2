"""The systems that `frontier.py` compares: rivals as published, and candidates of this project."""

from simulation.attention import System
from simulation.coders import (
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
from simulation.layers import ByLayer
from simulation.transforms import Moments, plan
from simulation.trellis import trellis

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
        if tricks.get(trick) and not (tricks.get("rival") and trick == "window"):
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
            {"centre": "before", "balance": True},
            {"centre": "before", "sinks": 1},
            {"centre": "before", "sinks": 4},
            {"centre": "after", "balance": True, "sinks": 1},
            TRICKS,
            {**TRICKS, "value_mean": True},
        )
    ]


def candidates() -> list[System | ByLayer]:
    """Mixes with centred and balanced keys and one sink, scales in 16 and in 8 bits; bits by layer."""
    mixes = ((6, 4), (5, 5), (5, 4), (4, 5), (5, 3), (4, 4), (4, 3), (3, 4), (4, 2), (3, 3), (3, 2), (2, 3), (2, 2))
    plain = [tq(*mix, bits, **TRICKS) for mix in mixes for bits in (16, 8)]
    windows = [tq(*mix, 8, **TRICKS, window=16) for mix in ((3, 3), (3, 2), (2, 3), (2, 2))]
    # What a budget leaves for codes when scales, the mean, the balance and a sink are paid.
    return [*plain, *windows, *(by_layer(code_bits) for code_bits in (2.25, 3.0, 4.0))]


def by_layer(code_bits: float, **more) -> ByLayer:
    return ByLayer(system(exact(), exact(), "centred", **TRICKS, **more), code_bits)


def on_trellis(keys: float, values: float, **tricks) -> System:
    return system(trellis(keys, 8), trellis(values, 8), **tricks)


def learned(
    moments: dict[str, list[Moments]], domain: str, keys: float, values: float, kind: str = "text", **more
) -> System:
    """Keys and values in bases of a calibration run over a kind of text; keys "after" or "before" RoPE."""
    made = plan(moments[kind], domain, keys, values, on_trellis=more.pop("on_a_trellis", False))
    first = made[0]
    name = f"{first[0].name}/{first[1].name} {domain}-RoPE" + (f" from {kind}" if kind != "text" else "")
    tricks = {"centre": "before", "sinks": 1, **more}
    return system(*first, name, **tricks, unturned=domain == "before", plan=made)


def calibrated(moments: dict[str, list[Moments]]) -> list[System]:
    """Transform coding at several widths; the trellis at few, for it is slow."""
    mixes = ((4, 4), (3.5, 3.5), (4, 3), (3, 4), (3, 3), (2.5, 3), (2, 3), (2.5, 2.5), (2, 2.5), (2, 2), (1.5, 2))
    domains, ends = ("before", "after"), ((3, 3), (2, 2))
    return [
        *(learned(moments, domain, *mix) for domain in domains for mix in mixes),
        *(learned(moments, domain, *mix, kind="code") for domain in domains for mix in (*ends, (4, 4), (2, 3))),
        *(learned(moments, domain, *mix, on_a_trellis=True) for domain in domains for mix in ends),
    ]


def main_systems(moments: dict[str, list[Moments]]) -> list[System | ByLayer]:
    trellises = [on_trellis(2, 2), on_trellis(3, 3), *(on_trellis(*mix, **TRICKS) for mix in ((2, 2), (3, 2), (3, 3)))]
    return [*rivals(), *ablations(), *candidates(), *trellises, *calibrated(moments), system(exact(), exact())]


def long_systems(moments: dict[str, list[Moments]]) -> list[System | ByLayer]:
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
        on_trellis(2, 2, **TRICKS, window=32),
        by_layer(2.25),
        *(
            learned(moments, domain, *mix, window=window)
            for domain in ("before", "after")
            for mix, window in (((2, 2), 0), ((2, 2), 32), ((2, 2.25), 16), ((1.5, 2), 32), ((3, 3), 0))
        ),
    ]


def systems(part: str, moments: dict[str, list[Moments]]) -> list[System | ByLayer]:
    """Each system of a part once, by name."""
    listed = (long_systems if part == "long" else main_systems)(moments)
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
