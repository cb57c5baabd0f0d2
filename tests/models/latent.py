"""A latent of all heads and one rotary key in the cache; keys and values of every token are made of it at each step."""

import torch
from torch import nn

EXPECT = "compressed"
DIM, HEADS, NOPE, ROPE, V_DIM, RANK = 64, 4, 32, 16, 32, 32


def rotate(x, positions):
    angles = positions[:, None] * 1e4 ** (-torch.arange(0, ROPE, 2) / ROPE)
    angles = angles.view(1, -1, *[1] * (x.dim() - 3), ROPE // 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1)


class LatentAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(DIM, HEADS * (NOPE + ROPE), bias=False)
        self.wkv_a, self.kv_norm = nn.Linear(DIM, RANK + ROPE, bias=False), nn.RMSNorm(RANK)
        self.wkv_b = nn.Linear(RANK, HEADS * (NOPE + V_DIM), bias=False)
        self.wo = nn.Linear(HEADS * V_DIM, DIM, bias=False)

    def forward(self, x, positions, cache):
        bsz, seqlen, _ = x.size()
        q = self.wq(x).view(bsz, seqlen, HEADS, NOPE + ROPE)
        q_nope, q_pe = torch.split(q, [NOPE, ROPE], dim=-1)
        q = torch.cat([q_nope, rotate(q_pe, positions)], dim=-1)
        kv, k_pe = torch.split(self.wkv_a(x), [RANK, ROPE], dim=-1)
        kv, k_pe = self.kv_norm(kv), rotate(k_pe, positions)
        if cache is not None:
            kv, k_pe = torch.cat([cache[0], kv], dim=1), torch.cat([cache[1], k_pe], dim=1)
        expanded = self.wkv_b(kv).view(bsz, -1, HEADS, NOPE + V_DIM)
        k_nope, v = torch.split(expanded, [NOPE, V_DIM], dim=-1)
        k = torch.cat([k_nope, k_pe.unsqueeze(2).expand(-1, -1, HEADS, -1)], dim=-1)
        scores = torch.einsum("bshd,bthd->bsht", q, k) * (NOPE + ROPE) ** -0.5
        hidden = torch.arange(kv.size(1))[None, :] > positions[:, None]
        scores = scores.masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(dim=-1, dtype=torch.float32).type_as(x)
        return self.wo(torch.einsum("bsht,bthd->bshd", scores, v).flatten(2)), (kv, k_pe)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(48, DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(LatentAttention() for _ in range(2))

    def forward(self, tokens, positions, cache):
        h, kept = self.embed(tokens), {}
        for at, layer in enumerate(self.layers):
            out, kept[at] = layer(h, positions, cache.get(at))
            h = h + out
        return self.head(h), kept


def make():
    return Transformer()


def start(model):
    return {}


def feed(call, state, ids):
    seen = state[0][0].shape[1] if state else 0
    return call(ids, torch.arange(seen, seen + ids.shape[1]), state)


def caches(model, state):
    return [tensor for kv in state.values() for tensor in kv]
