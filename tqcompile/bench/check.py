"""What a result must be before its time counts: close to the reference over the same planes, on two of the heads."""

from collections.abc import Iterator

import torch

from tqcompile import coding, reference
from tqcompile.bench.shapes import Shape
from tqcompile.codec import Codec

# Half precision rounds products by 2e-3; a wrong mask, address or table is off by far more than this.
TOLERANCE = 1e-2
# Tokens of a head that a check of encoded tokens decodes.
TOKENS = 64


class WrongResult(ArithmeticError):
    """A kernel's result is not the reference's; its time would mean nothing."""


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    """|result - expected| / |expected|; infinite where a number is none."""
    error = (result.double() - expected.double()).norm() / expected.double().norm()
    return error.item() if error.isfinite() else float("inf")


def require(what: str, result: torch.Tensor, expected: torch.Tensor, allowed: float = TOLERANCE) -> None:
    """Raise `WrongResult` unless the result is as close as rounding explains."""
    off = distance(result, expected)
    if not off <= allowed:
        raise WrongResult(f"{what} is off by {off:.2g} of its size ({allowed} is allowed); its time is not shown")


def corners(shape: Shape) -> Iterator[tuple[slice, slice, slice]]:
    """The first and the last KV head of the batch: (sequence, KV head, the query heads that read it)."""
    group = shape.heads // shape.kv_heads
    for row, head in {(0, 0), (shape.batch - 1, shape.kv_heads - 1)}:
        yield slice(row, row + 1), slice(head, head + 1), slice(head * group, (head + 1) * group)


def attention(what: str, out, q, keys, values, mask, sinks, codecs: tuple[Codec, Codec], shape: Shape) -> None:
    """Check out [B, Hq, 1, D] of attention over planes of keys and values."""
    for row, head, queries in corners(shape):
        planes = [[plane[row, head] for plane in side] for side in (keys, values)]
        seen = mask if mask is None else mask[row]
        dims = (shape.head_dim, shape.head_dim)
        how = seen, False, shape.head_dim**-0.5, *codecs, dims, shape.score_mod
        expected = reference.attend(q[row, queries], *planes, *how, None if sinks is None else sinks[row, queries])
        require(what, out[row, queries], expected)


def dense_attention(what: str, out, q, keys, values, shape: Shape) -> None:
    """Check the last query of out [B, Hq, T, D], which reads all tokens whether or not attention is causal."""
    for row, head, queries in corners(shape):
        k, v = keys[row, head].float(), values[row, head].float()
        scores = q[row, queries, -1:].float() @ k.transpose(-1, -2) * shape.head_dim**-0.5
        require(what, out[row, queries, -1:], scores.softmax(-1) @ v)


def scores(what: str, out, q, keys, codec: Codec | None, shape: Shape) -> None:
    """Check scores out [B, Hq, T, S] of q over planes of keys, or over dense ones where `codec` is None."""
    for row, head, queries in corners(shape):
        if codec is None:
            expected = q[row, queries].float() @ keys[row, head].float().mT
        else:
            expected = reference.logits(q[row, queries], [plane[row, head] for plane in keys], codec, shape.head_dim)
        require(what, out[row, queries], expected)


def encoded(what: str, planes, x: torch.Tensor, codec: Codec, shape: Shape, last: int) -> None:
    """Check the tokens before `last` in the planes against x [B, H, T, D], in the codec's basis, whose end they are.

    They must be as close to x as what the reference encodes: half precision takes a number over an edge now and then.
    """
    count = min(TOKENS, x.shape[2])
    for row, head, _ in corners(shape):
        token = x[row, head, -count:].float()
        found = coding.decode(codec, [plane[row, head, last - count : last] for plane in planes], shape.head_dim)
        best = coding.decode(codec, coding.encode(codec, token), shape.head_dim)
        require(what, found, token, distance(best, token) * (1 + TOLERANCE) + TOLERANCE / 10)
