"""A latent cache in buffers that is never expanded: the query is brought into the latent's space instead."""

import torch
from torch import nn

EXPECT = "compressed"
DIM, HEADS, NOPE, ROPE, V_DIM, RANK, MAX_LEN = 64, 4, 32, 16, 32, 32, 32


def rotate(x, freqs_cis):
    dtype = x.dtype
    x = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(x * freqs_cis.view(1, x.size(1), 1, x.size(-1))).flatten(3).to(dtype)


class LatentAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq = nn.Linear(DIM, HEADS * (NOPE + ROPE))
        self.wkv_a, self.kv_norm = nn.Linear(DIM, RANK + ROPE), nn.RMSNorm(RANK)
        self.wkv_b = nn.Linear(RANK, HEADS * (NOPE + V_DIM), bias=False)
        self.wo = nn.Linear(HEADS * V_DIM, DIM)
        self.register_buffer("kv_cache", torch.zeros(2, MAX_LEN, RANK), persistent=False)
        self.register_buffer("pe_cache", torch.zeros(2, MAX_LEN, ROPE), persistent=False)

    def forward(self, x, start_pos: int, freqs_cis, mask):
        bsz, seqlen, _ = x.size()
        end_pos = start_pos + seqlen
        q = self.wq(x).view(bsz, seqlen, HEADS, NOPE + ROPE)
        q_nope, q_pe = torch.split(q, [NOPE, ROPE], dim=-1)
        q_pe = rotate(q_pe, freqs_cis)
        kv, k_pe = torch.split(self.wkv_a(x), [RANK, ROPE], dim=-1)
        k_pe = rotate(k_pe.unsqueeze(2), freqs_cis)
        wkv_b = self.wkv_b.weight.view(HEADS, -1, RANK)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, :NOPE])
        self.kv_cache[:bsz, start_pos:end_pos] = self.kv_norm(kv)
        self.pe_cache[:bsz, start_pos:end_pos] = k_pe.squeeze(2)
        scores = torch.einsum("bshc,btc->bsht", q_nope, self.kv_cache[:bsz, :end_pos])
        scores = (scores + torch.einsum("bshr,btr->bsht", q_pe, self.pe_cache[:bsz, :end_pos])) * (NOPE + ROPE) ** -0.5
        if mask is not None:
            scores = scores + mask.unsqueeze(1)
        scores = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)
        x = torch.einsum("bsht,btc->bshc", scores, self.kv_cache[:bsz, :end_pos])
        x = torch.einsum("bshc,hdc->bshd", x, wkv_b[:, -V_DIM:])
        return self.wo(x.flatten(2))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(48, DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(LatentAttention() for _ in range(2))
        angles = torch.outer(torch.arange(MAX_LEN), 1e4 ** (-torch.arange(0, ROPE, 2) / ROPE))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, tokens, start_pos: int = 0):
        seqlen, h, mask = tokens.size(1), self.embed(tokens), None
        if seqlen > 1:
            mask = torch.full((seqlen, start_pos + seqlen), float("-inf")).triu_(start_pos + 1)
        for layer in self.layers:
            h = h + layer(h, start_pos, self.freqs_cis[start_pos : start_pos + seqlen], mask)
        return self.head(h)


def make():
    return Transformer()


def start(model):
    return 0


def feed(call, state, ids):
    return call(ids, state), state + ids.size(1)


def caches(model, state):
    return [tensor for layer in model.layers for tensor in (layer.kv_cache, layer.pe_cache)]
