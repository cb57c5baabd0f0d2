"""Two vectors for all tokens of a head: what is taken off keys before they are encoded, and what they are divided by.

Keys that a model rotates by their positions have a mean m before that rotation. Token s of a cache keeps
(k - R(s) m) / b, channel by channel; attention multiplies queries by b, and the score of a query q gets q . R(s) m
back. Whatever m, b, R and a token's place are, scores stay what they were: it is codes of keys that get better where
R(s) m comes close to the mean, and where b makes channels that queries weigh alike equally large. As a rotation by
s + a is one by s after one by a, a place in the cache does for the position: what rows are padded by is in their m.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

from tqcompile import principal, reference

# Tokens from which a mean is taken: fewer say little, and the first one of a text is often like no other.
FEWEST = 16
# The balance of a channel is within this factor of the mean one's, either way.
MOST_BALANCE = 8.0
# What both vectors are kept in, and the largest mean that is: any mean does.
VECTORS, MOST_MEAN = torch.float16, 6e4
# Mean squares that it is made of: of less nothing is known, and more is beyond float32.
SQUARES = (1e-12, 1e36)


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
    `sinks` that are kept as they are: those are like no others, and have no codes to gain. With `principal` what is
    left is kept in a basis of its own; `plain` tokens have that alone.
    """

    rotation: Rotation
    dim: int
    given: torch.Tensor | None = None
    sinks: int = 0
    principal: bool = False
    plain: bool = False

    def __str__(self) -> str:
        if self.plain:
            return "in the principal components of its first tokens"
        turning = sum(frequency != 0 for frequency in self.rotation.frequencies)
        turns = f"a mean that positions turn in {turning} of {len(self.rotation.frequencies)} channels"
        basis = ", in their principal components" * self.principal
        return f"keys balanced, and less {turns if turning else 'a mean that is the same at all positions'}{basis}"

    @property
    def rows(self) -> int:
        """Of `Centre.vectors`, along the tokens."""
        return principal.BEFORE + self.principal * len(self.rotation.frequencies)

    def of(self, keys: torch.Tensor) -> "Centre":
        """The centre of dense keys, which fill a cache from its first place on."""
        frequencies, partners = tables(self.rotation, keys.device)
        slots = torch.arange(keys.shape[self.dim], device=keys.device)
        with torch.inference_mode(False), torch.no_grad():
            more = self.start(keys), None, self.dim, self.sinks, self.principal, self.plain
            vectors = learned(keys.detach(), slots, frequencies, partners, *more)
        return Centre(self.rotation, self.dim, vectors)

    def nothing(self, keys: torch.Tensor) -> "Centre":
        """The centre of keys that nothing was taken off."""
        shape = [*keys.shape[: self.dim], 1, *keys.shape[self.dim + 1 :]]
        with torch.inference_mode(False):
            mean = torch.zeros(shape, dtype=VECTORS, device=keys.device)
            parts = [mean, mean + 1, *[principal.standard(mean, self.dim)] * self.principal]
            return Centre(self.rotation, self.dim, torch.cat(parts, self.dim))

    def start(self, keys: torch.Tensor) -> torch.Tensor | None:
        """`given`, as it lies beside the keys."""
        return None if self.given is None else self.given.to(keys.device).unsqueeze(self.dim - 1)


@dataclass(frozen=True, eq=False)
class Centre:
    """What was taken off the keys of one cache, and what they were divided by.

    `vectors` float16 are as wide as the cache with two tokens along `dim`: the mean m, and the balance b behind it; and
    behind that as many as it has channels, where there is a basis.
    """

    rotation: Rotation
    dim: int
    vectors: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return _mean_and_balance(self.vectors, self.dim)[0]

    @property
    def balance(self) -> torch.Tensor:
        return _mean_and_balance(self.vectors, self.dim)[1]

    def fits(self, centring: Centring | None) -> bool:
        """Whether a graph that centres so reads these keys aright."""
        return centring is not None and self.kind == (centring.rotation, centring.dim, centring.principal)

    @property
    def kind(self) -> tuple[Rotation, int, bool]:
        """What graphs that read these keys depend on."""
        return self.rotation, self.dim, principal.has_basis(self.vectors, self.dim)

    def at(self, slots: torch.Tensor) -> torch.Tensor:
        """What was taken off at these places [T], float32."""
        return turned(self.mean, slots, *tables(self.rotation, self.vectors.device), self.dim)

    def less(self, dense: torch.Tensor, slots: torch.Tensor | None = None) -> torch.Tensor:
        """What is left of dense keys at the places `slots` [T], or from a cache's first place on, in their dtype."""
        slots = self.places(0, dense) if slots is None else slots
        return less(dense, self.vectors, slots, *tables(self.rotation, self.vectors.device), self.dim)

    def more(self, left: torch.Tensor) -> torch.Tensor:
        """The dense keys of which this is left, in float32."""
        left = principal.out_of(left.float(), self.vectors, self.dim)
        return left * self.balance + self.at(self.places(0, left))

    def places(self, start: int, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(start, start + tokens.shape[self.dim], device=self.vectors.device)


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


def _mean_and_balance(vectors: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32: what is computed with them must be the same wherever it is."""
    return vectors.narrow(dim, 0, 1).float(), vectors.narrow(dim, 1, 1).float()


def less(keys: torch.Tensor, vectors: torch.Tensor, slots, frequencies, partners, dim: int) -> torch.Tensor:
    """(k - R(s) m) / b of keys, in its basis where it has one, in their dtype."""
    mean, balance = _mean_and_balance(vectors, dim)
    left = (keys.float() - turned(mean, slots, frequencies, partners, dim)) / balance
    return principal.into(left, vectors, dim).to(keys.dtype)


def more(left: torch.Tensor, vectors: torch.Tensor, frequencies, partners, dim: int) -> torch.Tensor:
    """The keys of which this is left, from a cache's first place on, in their dtype."""
    mean, balance = _mean_and_balance(vectors, dim)
    slots = torch.arange(left.shape[dim], device=left.device)
    whole = principal.out_of(left.float(), vectors, dim) * balance
    return (whole + turned(mean, slots, frequencies, partners, dim)).to(left.dtype)


def learned(
    keys: torch.Tensor,
    slots,
    frequencies,
    partners,
    given,
    squares: torch.Tensor | None,
    dim: int,
    sinks: int = 0,
    in_basis: bool = False,
    plain: bool = False,
) -> torch.Tensor:
    """`Centre.vectors` of keys: the mean of what is turned back, or `given` where fewer than `FEWEST` tokens hold
    anything, and the balance, by the mean `squares` of queries' channels where those are known, as wide as one token.
    With `in_basis`, the principal components of what is left behind them; of `plain` tokens that is all there is.

    A token of zeros is one that was not written, and one that is not finite must not be in what others are less. The
    first `sinks` places are left out.
    """
    keys = keys.float()
    seen = keys.isfinite().all(-1, keepdim=True) & (keys != 0).any(-1, keepdim=True)
    seen = seen & _along(slots >= sinks, keys.dim(), dim)
    keys = torch.where(seen, keys, 0.0)
    count = seen.sum(dim, keepdim=True)
    enough, few = count >= FEWEST, count.clamp(min=1)
    mean = turned(keys, -slots, frequencies, partners, dim).sum(dim, keepdim=True) / few
    mean = torch.where(enough & mean.isfinite() & (not plain), mean, 0.0 if given is None else given)
    # As it is kept: what is taken off is what comes back.
    mean = mean.clamp(-MOST_MEAN, MOST_MEAN).to(VECTORS).float()
    left = torch.where(seen, keys - turned(mean, slots, frequencies, partners, dim), 0.0)
    balance = _balance(left.square().sum(dim, keepdim=True) / few, squares)
    balance = torch.where(enough & (not plain), balance, 1.0).to(VECTORS)
    axes = [principal.learned(left / balance.float(), enough, dim).to(VECTORS)] * in_basis
    return torch.cat([mean.to(VECTORS), balance, *axes], dim)


def _balance(keys: torch.Tensor, queries: torch.Tensor | None) -> torch.Tensor:
    """The balance of channels with these mean squares [..., D].

    |q b|^2 |k / b|^2 is least where b^4 = E k^2 / E q^2 (Cauchy-Schwarz, channel by channel). Of queries that nobody
    has seen, half of that is right on a logarithmic scale: they are small where keys are large, but how much is theirs.
    """
    logarithm = keys.clamp(*SQUARES).log() / 8
    if queries is not None:
        logarithm = 2 * logarithm - queries.nan_to_num(0.0).clamp(*SQUARES).log() / 4
    most = math.log(MOST_BALANCE)
    return (logarithm - logarithm.mean(-1, keepdim=True)).clamp(-most, most).exp()


def squares_of(q: torch.Tensor, heads: int, order: tuple[int, ...]) -> torch.Tensor:
    """Mean squares of the channels of queries [B, Hq, T, D] for each of so many heads of keys, as a cache has one
    token whose dimensions are to be permuted by `order` to lie as theirs do."""
    squares = q.float().square().mean(2, keepdim=True).unflatten(1, (heads, -1)).mean(2)
    return squares.permute([order.index(dim) for dim in range(4)])


def waves(tokens: int, frequencies: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """[tokens, columns]: cosines and sines of each plane at each place. The same for all heads and layers.

    On a GPU, `halves` of them.
    """
    slots = torch.arange(tokens, device=first.device).float().unsqueeze(-1)
    angles = slots * frequencies[first]
    table = torch.cat([angles.cos(), angles.sin()], -1)
    return halves(table) if table.is_cuda else table


def halves(numbers: torch.Tensor) -> torch.Tensor:
    """Float16 [2, ...] whose sum is `numbers` of magnitude 1 or less, to 2^-23."""
    high = numbers.half()
    return torch.stack([high, (numbers - high.float()).half()])


@reference.as_stored
def waved(q: torch.Tensor, vectors: torch.Tensor, first, second, others, scale: float) -> torch.Tensor:
    """What `reference.shifted` makes scale q . R(s) m of: [B, Hq, T, columns + 1], float32.

    q [B, Hq, T, D], vectors [B or 1, H, n, D]. The columns are those of `waves`, and behind them is what no position
    turns.
    """
    heads, mean = vectors.shape[1], vectors[:, :, :1].float()
    q, mean = q.float().unflatten(1, (heads, q.shape[1] // heads)) * scale, mean.unsqueeze(2)
    q1, q2, m1, m2 = q[..., first], q[..., second], mean[..., first], mean[..., second]
    still = (q[..., others] * mean[..., others]).sum(-1, keepdim=True)
    return torch.cat([q1 * m1 + q2 * m2, q1 * m2 - q2 * m1, still], -1).flatten(1, 2)
