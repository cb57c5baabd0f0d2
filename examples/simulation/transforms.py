"""Transform coding of keys and values: a basis per head in which the damage is spread as unevenly as it can be.

An error e of a key costs q . e, on average e^T E[q q^T] e; of a value |W_O e|^2. In the basis that makes the cost a
plain sum of squares and the coordinates uncorrelated, bits go where the variance is (reverse water-filling). Moments
are gathered once for a model on other text than what is measured. Coordinates are sorted by variance and coded in
groups, each at a width of its own and turned by a random rotation within.
"""

from dataclasses import dataclass

import torch
from simulation.attention import Simulation, rope, unrope
from simulation.coders import USUAL_SIZE, Coder, byte_scale
from simulation.trellis import STATE_BITS, gaussian_codebook, viterbi

from tqcompile import tables

WIDEST = 8
# Relative weight of a multiple of the identity that keeps unseen directions from being thought free.
SHRINKAGE = 0.01


@dataclass
class Moments:
    """Second moments [H, D, D] of one layer, float64: centred keys and queries before and after RoPE; values, W_O."""

    keys: dict[str, torch.Tensor]
    queries: dict[str, torch.Tensor]
    values: torch.Tensor
    output: torch.Tensor


def gather(simulation: Simulation, windows: torch.Tensor, skip: int = 1) -> list[Moments]:
    """Moments of every layer over windows [N, T], their first `skip` tokens left out, run dense."""
    sums: dict[int, Moments] = {}

    def watch(module, query, key, value):
        heads, head_dim = key.shape[1], key.shape[-1]
        plain = unrope(key, *simulation.turns)
        mean = plain[:, :, skip : simulation.prompt].mean(2, keepdim=True)
        grouped = query.unflatten(1, (heads, -1))
        turned = key - rope(mean.expand_as(key), *simulation.turns)
        weight = module.o_proj.weight.double().unflatten(1, (heads, -1, head_dim))
        found = Moments(
            {"before": moment(plain - mean, skip), "after": moment(turned, skip)},
            {
                "before": moment(unrope(query, *simulation.turns).unflatten(1, (heads, -1)), skip),
                "after": moment(grouped, skip),
            },
            moment(value, skip),
            torch.einsum("ohgd,ohge->hde", weight, weight),
        )
        seen = sums.setdefault(module.layer_idx, found)
        if seen is not found:
            for which in ("before", "after"):
                seen.keys[which] += found.keys[which]
                seen.queries[which] += found.queries[which]
            seen.values += found.values

    simulation.watch = watch
    for window in windows:
        simulation.logits(window, 1)
    simulation.watch = None
    return [sums[layer] for layer in range(simulation.layers)]


def moment(x: torch.Tensor, skip: int) -> torch.Tensor:
    """x [1, H, ..., T, D] -> E x x^T [H, D, D], float64."""
    rows = x[0, ..., skip:, :].double().flatten(1, -2)
    return rows.mT @ rows / rows.shape[1]


def shrunk(moments: torch.Tensor, weight: float = SHRINKAGE) -> torch.Tensor:
    """Moments with a little of their mean variance in every direction."""
    variance = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return (1 - weight) * moments + weight * variance[:, None, None] * identity


@dataclass
class Transform:
    """x -> y = x @ analysis, x = y @ synthesis, per head [H, D, D]; unit variances, of cost [H, D]."""

    analysis: torch.Tensor
    synthesis: torch.Tensor
    variance: torch.Tensor


def transform(signal: torch.Tensor, cost: torch.Tensor) -> Transform:
    """The basis for vectors of second moments `signal` whose errors e cost e^T `cost` e; both [H, D, D]."""
    values, vectors = torch.linalg.eigh(shrunk(cost))
    root = vectors * values.sqrt()[:, None] @ vectors.mT
    inverse = vectors * values.rsqrt()[:, None] @ vectors.mT
    variance, basis = torch.linalg.eigh(root @ shrunk(signal) @ root)
    variance, basis = variance.flip(-1), basis.flip(-1)
    deviation = variance.sqrt()[:, None]
    return Transform(
        (root @ basis / deviation).float(), (inverse @ (basis * deviation)).mT.contiguous().float(), variance.float()
    )


def distortion(bits: int, head_dim: int = 64) -> float:
    """What a coordinate of unit variance keeps of its variance as error."""
    return 1.0 if bits == 0 else tables.sphere_distortion(bits, head_dim)


def allocate(variance: torch.Tensor, total: int, group: int) -> list[int]:
    """Bits for groups of `group` coordinates of variance [..., D], `total` for a vector, by the greatest gain first.

    Raises:
        ValueError: total is no multiple of group, or more than every group can take.
    """
    sums = variance.flatten(0, -2).sum(0).unflatten(0, (-1, group)).sum(-1).tolist()
    if total % group or total > WIDEST * group * len(sums):
        raise ValueError(f"total={total}; give a multiple of {group}, at most {WIDEST * group * len(sums)}")
    bits = [0] * len(sums)
    for _ in range(total // group):
        gains = [
            cost * (distortion(width) - distortion(width + 1)) if width < WIDEST else -1.0
            for cost, width in zip(sums, bits)
        ]
        bits[gains.index(max(gains))] += 1
    return bits


def transformed(name: str, basis: Transform, bits: list[int], on_trellis: bool = False) -> Coder:
    """Groups of coordinates at `bits` each, scalar codes or on one trellis, and one scale a vector in 8 bits."""
    head_dim = basis.analysis.shape[-1]
    group = head_dim // len(bits)
    coded = sum(width > 0 for width in bits) * group
    cost = basis.variance[:, None, :coded]

    def code(x: torch.Tensor, seed: int) -> torch.Tensor:
        y = (x @ basis.analysis)[..., :coded]
        size = y.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        turn = tables.rotation(group, seed).to(x.device)
        parts = (y / size).unflatten(-1, (-1, group)) @ turn.T
        if on_trellis:
            weights = cost.unflatten(-1, (-1, group)).mean(-1, keepdim=True).expand(parts.shape)
            numbers = on_a_trellis(parts, weights, bits[: coded // group])
        else:
            numbers = [nearest(part.contiguous(), width, head_dim) for part, width in zip(parts.unbind(-2), bits)]
            numbers = torch.stack(numbers, -2)
        numbers = (numbers @ turn).flatten(-2)
        fitted = (cost * y * y).sum(-1, keepdim=True) / (cost * y * numbers).sum(-1, keepdim=True)
        scale = torch.where(fitted > 0, byte_scale(fitted.clamp_min(0), USUAL_SIZE), 0.0)
        return (numbers * scale) @ basis.synthesis[:, :coded]

    return Coder(name, lambda head_dim: (sum(bits) * group + 8) / head_dim, code, True, basis.analysis.numel())


def nearest(x: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    codebook = x.new_tensor(tables.sphere_codebook(bits, head_dim))
    return codebook[torch.bucketize(x, (codebook[1:] + codebook[:-1]) / 2)]


def on_a_trellis(parts: torch.Tensor, weights: torch.Tensor, bits: list[int]) -> torch.Tensor:
    """parts and weights [..., groups, group], at bits[i] a coordinate of group i -> their numbers on one trellis."""
    codebook = gaussian_codebook(STATE_BITS).to(parts.device)
    widths = [width for width in bits for _ in range(parts.shape[-1])]
    flat, weight = parts.flatten(-2).flatten(0, -2), weights.flatten(-2).flatten(0, -2)
    return codebook[viterbi(flat, codebook, widths, weight)].view_as(parts)


def plan(
    moments: list[Moments], domain: str, keys: float, values: float, group: int = 8, on_trellis: bool = False
) -> tuple[tuple[Coder, Coder], ...]:
    """(keys, values) of every layer at mean widths `keys` and `values`, scales not counted."""
    mark = "tt" if on_trellis else "t"
    pairs = []
    for layer in moments:
        key = transform(layer.keys[domain], layer.queries[domain])
        value = transform(layer.values, layer.output)
        head_dim = key.analysis.shape[-1]
        pairs.append(
            (
                transformed(f"{keys:g}{mark}", key, allocate(key.variance, round(keys * head_dim), group), on_trellis),
                transformed(
                    f"{values:g}{mark}", value, allocate(value.variance, round(values * head_dim), group), on_trellis
                ),
            )
        )
    return tuple(pairs)
