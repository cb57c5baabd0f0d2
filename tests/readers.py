"""Attention in the spellings that models use: functions of q, k, v and a bool mask that is True where a query sees."""

from collections.abc import Callable

import torch
from torch import nn


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    """Hugging Face's: [B, H, S, D] -> [B, H * times, S, D]."""
    batch, heads, length, dim = x.shape
    if times == 1:
        return x
    return x[:, :, None, :, :].expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)


def _groups(q, k) -> int:
    return q.shape[1] // k.shape[1]


def sdpa_mask(q, k, v, mask):
    times = _groups(q, k)
    return nn.functional.scaled_dot_product_attention(q, repeat_kv(k, times), repeat_kv(v, times), attn_mask=mask)


def sdpa_float_mask(q, k, v, mask):
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    return nn.functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


def sdpa_gqa_scale(q, k, v, mask):
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)


def eager_matmul(q, k, v, mask):
    times = _groups(q, k)
    scores = torch.matmul(q, repeat_kv(k, times).transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, repeat_kv(v, times))


def eager_at(q, k, v, mask):
    times = _groups(q, k)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    scores = (q @ k.repeat_interleave(times, dim=1).mT) / (q.shape[-1] ** 0.5) + bias
    return torch.softmax(scores.float(), -1).type_as(q) @ v.repeat_interleave(times, dim=1)


def eager_einsum(q, k, v, mask):
    times = _groups(q, k)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, repeat_kv(k, times)) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, repeat_kv(v, times))


def softcap(q, k, v, mask):
    times = _groups(q, k)
    scores = (q @ repeat_kv(k, times).permute(0, 1, 3, 2)) * 0.25
    scores = torch.tanh(scores / 2.0) * 2.0
    return scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).type(q.dtype) @ repeat_kv(v, times)


def alibi(q, k, v, mask):
    times = _groups(q, k)
    slopes = torch.linspace(-0.5, -0.1, q.shape[1], device=q.device).view(1, -1, 1, 1).to(q.dtype)
    distance = torch.arange(k.shape[2], device=q.device).to(q.dtype)
    scores = q @ repeat_kv(k, times).transpose(-1, -2) * q.shape[-1] ** -0.5 + slopes * distance
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ repeat_kv(v, times)


def sinks(q, k, v, mask):
    times = _groups(q, k)
    scores = q @ repeat_kv(k, times).transpose(-1, -2) * q.shape[-1] ** -0.5
    column = torch.linspace(-1, 1, q.shape[1], device=q.device).to(q.dtype).reshape(1, -1, 1, 1)
    column = column.expand(q.shape[0], -1, q.shape[2], 1)
    weights = torch.cat([scores.masked_fill(~mask, float("-inf")), column], -1).softmax(-1)
    return weights[..., :-1] @ repeat_kv(v, times)


def sinks_behind(q, k, v, mask):
    times = _groups(q, k)
    scores = (q @ repeat_kv(k, times).mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    logits = torch.linspace(-1, 1, q.shape[1], device=q.device).to(q.dtype).view(1, -1, 1)
    factor = (torch.logsumexp(scores, dim=-1) - logits).float().sigmoid()
    return (scores.softmax(-1) @ repeat_kv(v, times)) * factor.unsqueeze(-1).to(q.dtype)


def hidden_in_place(q, k, v, mask):
    scores = torch.matmul(q * q.shape[-1] ** -0.5, repeat_kv(k, _groups(q, k)).transpose(2, 3))
    scores.masked_fill_((mask == 0).expand_as(scores), torch.finfo(scores.dtype).min)
    return torch.softmax(scores.float(), dim=-1).type_as(scores) @ repeat_kv(v, _groups(q, k))


def zero_where_hidden(q, k, v, mask):
    scores = torch.matmul(q, repeat_kv(k, _groups(q, k)).mT) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(mask == torch.tensor(False, device=q.device), float("-inf")).softmax(-1)
    weights = weights.masked_fill(mask == torch.tensor(False, device=q.device), 0.0)
    return weights @ repeat_kv(v, _groups(q, k))


def differential(q, k, v, mask):
    """Two mixes by the same weights, each of one head's values in all heads."""
    first, second = (one.repeat(1, k.shape[1], 1, 1) for one in (v.narrow(1, 0, 1), v[:, -1:]))
    return sdpa_mask(q, k, first, mask) - 0.3 * sdpa_mask(q, k, second, mask)


READERS: dict[str, Callable] = {
    reader.__name__: reader
    for reader in (
        sdpa_mask,
        sdpa_float_mask,
        sdpa_gqa_scale,
        eager_matmul,
        eager_at,
        eager_einsum,
        softcap,
        alibi,
        sinks,
        differential,
        sinks_behind,
        hidden_in_place,
        zero_where_hidden,
    )
}
