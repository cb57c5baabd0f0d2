"""Two sets of logits for the same tokens: divergence, agreement and loss of each, and an interval of their means."""

from dataclasses import dataclass

import numpy
import torch
from scipy import stats

# Tokens whose log-probabilities are held at a time, in double precision.
ROWS = 64
BLOCK, RESAMPLES, CONFIDENCE = 64, 9999, 0.95


@dataclass(frozen=True)
class Tokens:
    """Figures of tokens [windows, T]: KL to dense, whether the likeliest token is dense's, and the loss of both.

    KL and losses are in nats; the loss is the negative log-likelihood of the token that the text has there.
    """

    kl: numpy.ndarray
    same: numpy.ndarray
    loss: numpy.ndarray
    dense_loss: numpy.ndarray

    @classmethod
    def joined(cls, parts: list["Tokens"]) -> "Tokens":
        """Parts of one window [T], one behind the other."""
        return cls(*(numpy.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    @classmethod
    def stacked(cls, parts: list["Tokens"]) -> "Tokens":
        """Windows of one length, one above the other."""
        return cls(*(numpy.stack([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def compare(dense: torch.Tensor, ours: torch.Tensor, following: torch.Tensor) -> Tokens:
    """Figures [T] of logits [T, vocabulary] at tokens that `following` [T] came after."""
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for p, q, token in zip(dense.split(ROWS), ours.split(ROWS), following.split(ROWS)):
        p, q = (x.to(ours.device).double().log_softmax(-1) for x in (p, q))
        at = token.to(p.device)[:, None]
        # A sum of positive and negative terms: rounding may put that of equal logits just below zero.
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
        row = kl, (p.argmax(-1) == q.argmax(-1)).double(), -q.gather(-1, at)[:, 0], -p.gather(-1, at)[:, 0]
        for column, part in zip(columns, row):
            column.append(part.cpu())
    return Tokens(*(torch.cat(column).numpy() for column in columns))


@dataclass(frozen=True)
class Increase:
    """How much larger a perplexity is than dense's, as a share of that, and the interval of it."""

    mean: float
    low: float
    high: float


def blocks(tokens: Tokens) -> numpy.ndarray:
    """Mean differences of the loss to dense's over blocks of consecutive tokens: neighbours are not independent.

    A window is cut into as many as come closest to `BLOCK` tokens each; the few that are left over join none.
    """
    difference = tokens.loss - tokens.dense_loss
    size = block_size(difference.shape[1])
    whole = difference.shape[1] // size * size
    return difference[:, :whole].reshape(-1, size).mean(-1)


def block_size(scored: int) -> int:
    """Tokens of a block in windows of `scored` tokens."""
    return scored // max(1, round(scored / BLOCK))


def increase(tokens: Tokens, seed: int = 0) -> Increase:
    """The increase of perplexity, with the percentile interval of a paired bootstrap.

    Paired: what is drawn anew are differences of the two losses of the same tokens, a block of them at a time.
    """
    mean = float((tokens.loss - tokens.dense_loss).mean())
    drawn = blocks(tokens)
    if len(drawn) < 2:
        return Increase(float(numpy.expm1(mean)), float("-inf"), float("inf"))
    found = stats.bootstrap(
        (drawn,),
        numpy.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=numpy.random.default_rng(seed),
    ).confidence_interval
    return Increase(*(float(numpy.expm1(x)) for x in (mean, found.low, found.high)))
