"""Attention written in more ways than `readers` has: functions of q [B, H, T, D] and of whatever the cache holds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

HEADS, HEAD_DIM = 4, 32


@dataclass(frozen=True)
class Spelling:
    """Attention over a cache that stores `kept` of keys and values [B, `heads`, T, D], with tokens in `dim`."""

    attend: Callable
    heads: int = HEADS
    kept: Callable = lambda x: x
    dim: int = 2


SPELLINGS: dict[str, Spelling] = {}


def spelling(**fields):
    """Register a function under its own name."""

    def add(function):
        SPELLINGS[function.__name__] = Spelling(function, **fields)
        return function

    return add


def seen(tokens, length):
    """Bool [tokens, length]: the last `tokens` of `length` places see those up to their own."""
    return torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)


def weights(scores):
    """Softmax of scores [..., T, S] over what each query sees."""
    return (scores / HEAD_DIM**0.5).masked_fill(~seen(*scores.shape[-2:]), float("-inf")).softmax(-1)


def fold(x):
    """[B, H, ...] -> [B * H, ...]."""
    return x.reshape(-1, *x.shape[2:])


@spelling(heads=2)
def heads_tiled_by_repeat(q, k, v):
    return weights(q @ k.repeat(1, 2, 1, 1).mT) @ v.repeat(1, 2, 1, 1)


@spelling(heads=2)
def heads_tiled_by_cat(q, k, v):
    k, v = torch.cat([k, k], 1), torch.cat([v, v], 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen(q.shape[2], k.shape[2]))


@spelling(heads=2)
def heads_tiled_by_expand(q, k, v):
    k, v = (x.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(x.shape[0], HEADS, -1, HEAD_DIM) for x in (k, v))
    return weights(q @ k.mT) @ v


@spelling(heads=2)
def heads_repeated_by_stack(q, k, v):
    k, v = (torch.stack([x, x], 2).flatten(1, 2) for x in (k, v))
    return weights(q @ k.mT) @ v


@spelling(heads=2)
def heads_by_index(q, k, v):
    order = torch.tensor([1, 0, 0, 1])
    k, v = k.index_select(1, order), v[:, order]
    return scaled_dot_product_attention(q, k, v, attn_mask=seen(q.shape[2], k.shape[2]))


@spelling(heads=1)
def one_head_broadcast(q, k, v):
    return weights(q @ k.mT) @ v


@spelling(heads=1, kept=lambda x: x.squeeze(1), dim=1)
def one_head_and_folded_queries(q, k, v):
    batch, heads, tokens, dim = q.shape
    scores = torch.bmm(q.transpose(1, 2).reshape(batch, -1, dim), k.transpose(1, 2))
    mix = weights(scores.view(batch, tokens, heads, -1).transpose(1, 2)).transpose(1, 2)
    return torch.bmm(mix.reshape(batch, tokens * heads, -1), v).view(batch, tokens, heads, dim).transpose(1, 2)


@spelling(heads=1, kept=lambda x: x.squeeze(1), dim=1)
def one_head_by_einsum(q, k, v):
    return torch.einsum("bhts,bsd->bhtd", weights(torch.einsum("bhtd,bsd->bhts", q, k)), v)


@spelling(heads=2)
def queries_of_a_group_folded(q, k, v):
    batch, heads, tokens, dim = q.shape
    mix = weights((q.reshape(batch, 2, -1, dim) @ k.mT).view(batch, heads, tokens, -1))
    return (mix.view(batch, 2, 2 * tokens, -1) @ v).view(batch, heads, tokens, dim)


@spelling(heads=2)
def groups_inside(q, k, v):
    return (weights(q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT) @ v[:, :, None]).flatten(1, 2)


@spelling(heads=2)
def groups_outside(q, k, v):
    mix = weights(torch.einsum("brgtd,bgsd->brgts", q.unflatten(1, (2, 2)), k))
    return torch.einsum("brgts,bgsd->brgtd", mix, v).flatten(1, 2)


@spelling(heads=2, kept=lambda x: x.transpose(1, 2), dim=1)
def groups_outside_heads_last(q, k, v):
    mix = weights(torch.einsum("brgtd,bsgd->bgrts", q.unflatten(1, (2, 2)), k))
    return torch.einsum("bgrts,bsgd->brgtd", mix, v).flatten(1, 2)


@spelling()
def keys_first_in_einsum(q, k, v):
    return torch.einsum("bhsd,bhts->bhtd", v, weights(torch.einsum("bhsd,bhtd->bhts", k, q)))


@spelling()
def scores_upright(q, k, v):
    scores = (k @ q.mT / HEAD_DIM**0.5).masked_fill(~seen(q.shape[2], k.shape[2]).t(), float("-inf"))
    return scores.softmax(2).mT @ v


@spelling()
def values_on_the_left(q, k, v):
    return (v.mT @ weights(q @ k.mT).mT).mT


@spelling(kept=lambda x: x.mT, dim=3)
def tokens_last(q, k, v):
    return weights(q @ k) @ v.mT


@spelling(kept=fold, dim=1)
def folded(q, k, v):
    return torch.bmm(weights(torch.bmm(fold(q), k.mT)), v).view(q.shape)


@spelling(kept=fold, dim=1)
def folded_with_a_bias(q, k, v):
    unread = torch.full((len(k), q.shape[2], k.shape[1]), float("nan"))
    scores = torch.baddbmm(unread, fold(q), k.mT, beta=0, alpha=0.5) + 0.1 * torch.arange(k.shape[1])
    return torch.baddbmm(torch.ones_like(fold(q)), weights(scores), v, beta=0.5, alpha=2.0).view(q.shape)


@spelling()
def folded_heads_outermost(q, k, v):
    q, k, v = (x.transpose(0, 1).reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return torch.bmm(weights(torch.bmm(q, k.mT)), v).view(HEADS, -1, *q.shape[1:]).transpose(0, 1)


@spelling(kept=lambda x: x.transpose(1, 2).flatten(2), dim=1)
def heads_and_dims_in_one(q, k, v):
    k, v = (x.view(x.shape[0], -1, HEADS, HEAD_DIM).transpose(1, 2) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen(q.shape[2], k.shape[2]))


@spelling(kept=lambda x: x.permute(2, 0, 1, 3).flatten(1, 2), dim=0)
def tokens_first_and_folded(q, k, v):
    return torch.bmm(weights(torch.bmm(fold(q), k.permute(1, 2, 0))), v.transpose(0, 1)).view(q.shape)


@spelling()
def halves_of_a_head(q, k, v):
    (q1, q2), (k1, k2), (v1, v2) = (x.chunk(2, -1) for x in (q, k, v))
    mix = weights(q1 @ k1.mT + q2 @ k2.mT)
    return torch.cat([mix @ v1, mix @ v2], -1)


@spelling()
def keys_scaled_and_normalised(q, k, v):
    return weights(q @ torch.nn.functional.normalize(k * 2, dim=-1).mT) @ (v - v.mean(2, keepdim=True))


@spelling()
def keys_as_values_too(q, k, v):
    return weights(q @ k.mT) @ k + v.mean(2, keepdim=True)


@spelling()
def without_a_softmax(q, k, v):
    return (q @ k.mT * seen(q.shape[2], k.shape[2])) @ v / k.shape[2]


@spelling()
def backwards(q, k, v):
    return weights((q @ k.flip(2).mT).flip(-1)).flip(-1) @ v.flip(2)


@spelling()
def every_second_token(q, k, v):
    hidden = ~seen(q.shape[2], k.shape[2])[:, ::2]
    return (q @ k[:, :, ::2].mT).masked_fill(hidden, -1e9).softmax(-1) @ v[:, :, ::2]


@spelling()
def head_by_head(q, k, v):
    parts = zip(q.unbind(1), k.unbind(1), v.unbind(1))
    return torch.stack([weights(a @ b.mT) @ c for a, b, c in parts], 1)


@spelling()
def batch_and_heads_swapped(q, k, v):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen(q.shape[2], k.shape[2])).transpose(0, 1)


@spelling()
def an_empty_place_in_front(q, k, v):
    mask = pad(seen(q.shape[2], k.shape[2]), (1, 0), value=True)
    return scaled_dot_product_attention(q, pad(k, (0, 0, 1, 0)), pad(v, (0, 0, 1, 0)), attn_mask=mask)


@spelling()
def a_prefix_in_front(q, k, v):
    prefix = torch.linspace(-1, 1, HEAD_DIM).expand(q.shape[0], HEADS, 2, -1)
    mask = pad(seen(q.shape[2], k.shape[2]), (2, 0), value=True)
    return scaled_dot_product_attention(q, torch.cat([prefix, k], 2), torch.cat([prefix, v], 2), attn_mask=mask)
