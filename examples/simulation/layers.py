"""Bits by layer and by keys and values, from what each costs in the first tokens of a window, within a budget."""

from dataclasses import dataclass, replace

import torch
from simulation.attention import Simulation, System, reference
from simulation.coders import exact, turboquant

from tqcompile import tables

# Damage is measured at this width, and follows the distortion of the codebook at others.
PROBE_BITS = 3
WIDTHS = (1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class ByLayer:
    """A system that is made anew for each window: `base` with widths of mean `budget` bits, scales not counted."""

    base: System
    budget: float
    scale_bits: int = 8
    seeded: bool = True
    rival: bool = False

    @property
    def name(self) -> str:
        return f"{self.budget:g}s8 by layer {self.base.name}"

    def made(self, simulation: Simulation, tokens: torch.Tensor, seed: int) -> System:
        """Widths from `damages` in the prompt of tokens [T]."""
        damage = damages(simulation, tokens[: simulation.prompt], self.base, seed)
        total = round(self.budget * len(damage) * 2)
        widths = spend(damage, total, simulation.head_dim)
        plan = tuple((turboquant(k, self.scale_bits), turboquant(v, self.scale_bits)) for k, v in widths)
        return replace(self.base, name=self.name, plan=plan)


def damages(simulation: Simulation, prompt: torch.Tensor, base: System, seed: int) -> list[tuple[float, float]]:
    """(keys, values) of each layer: mean KL over the prompt [T] where they alone are coded, at `PROBE_BITS`."""
    # The first tokens have too little to attend to.
    scored = len(prompt) * 3 // 4
    dense = reference(simulation, prompt, scored)
    probe, whole, found = turboquant(PROBE_BITS), exact(), []
    for layer in range(simulation.layers):
        pair = []
        for coders in ((probe, whole), (whole, probe)):
            plan = tuple(coders if other == layer else (whole, whole) for other in range(simulation.layers))
            logits = simulation.logits(prompt, scored, replace(base, plan=plan), seed)
            pair.append(max(0.0, dense.compare(logits)["kl"]))
        found.append(tuple(pair))
    return found


def spend(damage: list[tuple[float, float]], total: int, head_dim: int) -> list[tuple[int, int]]:
    """Widths (keys, values) of each layer, `total` bits in all, one bit at a time to where it saves most.

    The distortions of `WIDTHS` are convex, so that this is the best there is.

    Raises:
        ValueError: fewer bits than the least widths take, or more than the widest.
    """
    flat = [cost for pair in damage for cost in pair]
    if not WIDTHS[0] * len(flat) <= total <= WIDTHS[-1] * len(flat):
        raise ValueError(f"total={total}; give {WIDTHS[0] * len(flat)} to {WIDTHS[-1] * len(flat)}")
    loss = {bits: tables.sphere_distortion(bits, head_dim) for bits in WIDTHS}
    widths = [WIDTHS[0]] * len(flat)
    for _ in range(total - sum(widths)):
        gains = [
            cost * (loss[width] - loss[width + 1]) if width < WIDTHS[-1] else -1.0 for cost, width in zip(flat, widths)
        ]
        widths[gains.index(max(gains))] += 1
    return list(zip(widths[::2], widths[1::2]))
