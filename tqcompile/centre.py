"""A vector for all tokens of a head, turned by each token's place: what is taken off keys before they are encoded.

Keys that a model rotates by their positions have a mean before that rotation. Token s of a cache keeps what is left
of it less R(s) m, and the score of a query q gets q . R(s) m back. Whatever m, R and a token's place are, scores stay
what they were: it is codes of keys that get better where R(s) m comes close to the mean. As a rotation by s + a is one
by s after one by a, a place in the cache does for the position: what rows are padded by is in their m.
"""

from dataclasses import dataclass
from functools import cache

import torch

from tqcompile import reference

# Tokens from which a mean is taken: fewer say little, and the first one of a text is often like no other.
FEWEST = 16


@dataclass(frozen=True)
class Rotation:
    """How keys turn with their position p: channel d of x becomes x_d cos(w_d p) + x_e sin(w_d p), e its partner.

    `frequencies` are the w, in radians a position, with opposite signs in a pair; a channel that does not turn is its
    own partner and has 0.
    """

    frequencies: tuple[float, ...]
    partners: tuple[int, ...]

    def __post_init__(self):
        pairs = list(zip(self.frequencies, self.partners))
        if not pairs or len(self.frequencies) != len(self.partners):
            counts = len(self.frequencies), len(self.partners)
            raise ValueError(f"{counts[0]} frequencies and {counts[1]} partners; give one of each for a channel")
        for channel, (frequency, partner) in enumerate(pairs):
            there, back = pairs[partner] if 0 <= partner < len(pairs) else (None, None)
            still = partner == channel and frequency == 0
            if not still and (back != channel or there != -frequency or partner == channel):
                raise ValueError(f"partners={self.partners}: channel {channel} and its partner do not turn together")

    @property
    def turns(self) -> bool:
        """Whether any channel does."""
        return any(self.frequencies)


def still(head_dim: int) -> Rotation:
    """The rotation of keys that no position turns."""
    return Rotation((0.0,) * head_dim, tuple(range(head_dim)))


@cache
def tables(rotation: Rotation, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies float32 [D] and partners int64 [D] of a rotation."""
    with torch.inference_mode(False):
        return torch.tensor(rotation.frequencies, device=device), torch.tensor(rotation.partners, device=device)


@cache
def planes_of(rotation: Rotation, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The two channels of each plane that turns, the one with the positive frequency first, and the others: int64."""
    first = [d for d, frequency in enumerate(rotation.frequencies) if frequency > 0]
    second = [rotation.partners[d] for d in first]
    others = [d for d, frequency in enumerate(rotation.frequencies) if frequency == 0]
    with torch.inference_mode(False):
        return tuple(torch.tensor(each, dtype=torch.int64, device=device) for each in (first, second, others))


@dataclass(frozen=True)
class Centring:
    """What a graph takes off the keys of a cache whose tokens lie along `dim`.

    `given` [H, D] float32 are the vectors that the weights say; without them they come from the first tokens, less the
    `sinks` that are kept as they are: those are like no others, and have no codes to gain.
    """

    rotation: Rotation
    dim: int
    given: torch.Tensor | None = None
    sinks: int = 0

    def of(self, keys: torch.Tensor) -> "Centre":
        """The centre of dense keys, which fill a cache from its first place on."""
        frequencies, partners = tables(self.rotation, keys.device)
        slots = torch.arange(keys.shape[self.dim], device=keys.device)
        with torch.inference_mode(False), torch.no_grad():
            mean = learned(keys.detach(), slots, frequencies, partners, self.start(keys), self.dim, self.sinks)
        return Centre(self.rotation, self.dim, mean)

    def nothing(self, keys: torch.Tensor) -> "Centre":
        """The centre of keys that nothing was taken off."""
        shape = [*keys.shape[: self.dim], 1, *keys.shape[self.dim + 1 :]]
        with torch.inference_mode(False):
            return Centre(self.rotation, self.dim, torch.zeros(shape, device=keys.device))

    def start(self, keys: torch.Tensor) -> torch.Tensor | None:
        """`given`, as it lies beside the keys."""
        return None if self.given is None else self.given.to(keys.device).unsqueeze(self.dim - 1)


@dataclass(frozen=True, eq=False)
class Centre:
    """What was taken off the keys of one cache: `mean`, as wide as the cache with one token along `dim`, float32."""

    rotation: Rotation
    dim: int
    mean: torch.Tensor

    def fits(self, centring: Centring | None) -> bool:
        """Whether a graph that centres so reads these keys aright."""
        return centring is not None and (self.rotation, self.dim) == (centring.rotation, centring.dim)

    def at(self, slots: torch.Tensor) -> torch.Tensor:
        """What was taken off at these places [T], float32."""
        return turned(self.mean, slots, *tables(self.rotation, self.mean.device), self.dim)

    def less(self, dense: torch.Tensor, slots: torch.Tensor | None = None) -> torch.Tensor:
        """What is left of dense keys at the places `slots` [T], or from a cache's first place on, in their dtype."""
        return (dense.float() - self.at(self.places(0, dense) if slots is None else slots)).to(dense.dtype)

    def more(self, left: torch.Tensor) -> torch.Tensor:
        """The dense keys of which this is left, in float32."""
        return left.float() + self.at(self.places(0, left))

    def places(self, start: int, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(start, start + tokens.shape[self.dim], device=self.mean.device)


def _along(numbers: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """Numbers [T] or [T, D] as they lie beside `rank` dimensions, of which `dim` is that of tokens."""
    shape = [1] * rank
    shape[dim] = numbers.shape[0]
    shape[-1] = numbers.shape[-1] if numbers.dim() == 2 else 1
    return numbers.view(shape)


def _angles(slots: torch.Tensor, frequencies: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    return _along(slots.float().unsqueeze(-1) * frequencies, rank, dim)


def turned(mean: torch.Tensor, slots, frequencies, partners, dim: int) -> torch.Tensor:
    """R(s) m at the places `slots` [T], which lie along `dim`."""
    angles = _angles(slots, frequencies, mean.dim(), dim)
    return mean * angles.cos() + mean.index_select(-1, partners) * angles.sin()


def less(keys: torch.Tensor, mean: torch.Tensor, slots, frequencies, partners, dim: int) -> torch.Tensor:
    """Keys less R(s) m, in their dtype."""
    return (keys.float() - turned(mean, slots, frequencies, partners, dim)).to(keys.dtype)


def more(left: torch.Tensor, mean: torch.Tensor, frequencies, partners, dim: int) -> torch.Tensor:
    """The keys of which this is left, from a cache's first place on, in their dtype."""
    slots = torch.arange(left.shape[dim], device=left.device)
    return (left.float() + turned(mean, slots, frequencies, partners, dim)).to(left.dtype)


def learned(keys: torch.Tensor, slots, frequencies, partners, given, dim: int, sinks: int = 0) -> torch.Tensor:
    """The mean of keys that are turned back, or `given` where fewer than `FEWEST` tokens hold anything; float32.

    A token of zeros is one that was not written, and one that is not finite must not be in what others are less. The
    first `sinks` places are left out.
    """
    keys = keys.float()
    seen = keys.isfinite().all(-1, keepdim=True) & (keys != 0).any(-1, keepdim=True)
    seen = seen & _along(slots >= sinks, keys.dim(), dim)
    keys = torch.where(seen, keys, 0.0)
    back = turned(keys, -slots, frequencies, partners, dim)
    count = seen.sum(dim, keepdim=True)
    mean = back.sum(dim, keepdim=True) / count.clamp(min=1)
    return torch.where(count >= FEWEST, mean, 0.0 if given is None else given)


def waves(tokens: int, frequencies: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """[tokens, columns]: cosines and sines of each plane at each place, and ones. The same for all heads and layers."""
    slots = torch.arange(tokens, device=first.device).float().unsqueeze(-1)
    angles = slots * frequencies[first]
    return torch.cat([angles.cos(), angles.sin(), torch.ones_like(slots)], -1)


@reference.as_stored
def scores(q: torch.Tensor, mean: torch.Tensor, table: torch.Tensor, first, second, others, scale: float):
    """scale q . R(s) m of queries [B, Hq, T, D], a mean [B or 1, H, 1, D] and `waves` [S, columns]: [B, Hq, T, S]."""
    heads = mean.shape[1]
    q, mean = q.float().unflatten(1, (heads, q.shape[1] // heads)) * scale, mean.unsqueeze(2)
    q1, q2, m1, m2 = q[..., first], q[..., second], mean[..., first], mean[..., second]
    still = (q[..., others] * mean[..., others]).sum(-1, keepdim=True)
    waved = torch.cat([q1 * m1 + q2 * m2, q1 * m2 - q2 * m1, still], -1)
    return (waved.flatten(1, 2) @ table.T).contiguous()


def added(bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One additive mask of what centring adds to scores and a mask, bool (True keeps) or additive."""
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask
