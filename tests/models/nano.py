"""The small GPT everybody starts from, with a cache bolted on: fused qkv, learned places, lists that layers refill."""

import math

import torch
from torch import nn
from torch.nn import functional as F

EXPECT = "compressed"


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))

    def forward(self, x, kv):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if kv:
            k = torch.cat([kv[0], k], dim=-2)
            v = torch.cat([kv[1], v], dim=-2)
        kv[:] = [k, v]
        S = k.size(-2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, S - T : S, :S] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class GPT(nn.Module):
    def __init__(self, vocab_size=48, n_layer=2, n_head=2, n_embd=64, block_size=32):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.ln = nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(n_layer))
        self.attn = nn.ModuleList(CausalSelfAttention(n_embd, n_head, block_size) for _ in range(n_layer))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(n_embd, 2 * n_embd), nn.GELU()) for _ in range(n_layer))
        self.proj = nn.ModuleList(nn.Linear(2 * n_embd, n_embd) for _ in range(n_layer))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, idx, past):
        seen = past[0][0].size(2) if past[0] else 0
        pos = torch.arange(seen, seen + idx.size(1), device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for ln, attn, mlp, proj, kv in zip(self.ln, self.attn, self.mlp, self.proj, past):
            x = x + attn(ln(x), kv)
            x = x + proj(mlp(x))
        return self.lm_head(x)


def make():
    return GPT()


def start(model):
    return [[] for _ in model.attn]


def feed(call, state, ids):
    return call(ids, state), state


def caches(model, state):
    return [tensor for kv in state for tensor in kv]
