"""Keys kept as [B, H, D, S], ready for the product with the queries; distances cost a slope a head; a clipped qkv."""

import math

import torch
from torch import nn

EXPECT = "partly"
REFUSED = ("its tokens lie along the last dimension",)
D_MODEL, HEADS, HEAD = 64, 2, 32


def build_alibi_bias(n_heads, full_length):
    bias = torch.arange(1 - full_length, 1, dtype=torch.float32).view(1, 1, 1, full_length)
    m = torch.arange(1, n_heads + 1, dtype=torch.float32) * (8 / n_heads)
    return bias * (1.0 / torch.pow(2, m.view(1, n_heads, 1, 1)))


def attention(query, key, value, past, softmax_scale, attn_bias):
    b, s, _ = query.shape
    q = query.view(b, s, HEADS, HEAD).permute(0, 2, 1, 3)
    k = key.view(b, s, HEADS, HEAD).permute(0, 2, 3, 1)
    v = value.view(b, s, HEADS, HEAD).permute(0, 2, 1, 3)
    if past is not None:
        k = torch.cat([past[0], k], dim=3)
        v = torch.cat([past[1], v], dim=2)
    s_k = k.size(-1)
    attn_weight = q.matmul(k) * softmax_scale
    attn_weight = attn_weight + attn_bias[:, :, :, -s_k:]
    causal = torch.ones(s, s_k, dtype=torch.bool).tril(diagonal=s_k - s).logical_not()
    attn_weight = attn_weight.masked_fill(causal.view(1, 1, s, s_k), torch.finfo(q.dtype).min)
    out = torch.softmax(attn_weight, dim=-1).matmul(v)
    return out.permute(0, 2, 1, 3).flatten(2), (k, v)


class Block(nn.Module):
    def __init__(self, clip_qkv=6.0):
        super().__init__()
        self.clip_qkv, self.norm = clip_qkv, nn.LayerNorm(D_MODEL)
        self.Wqkv, self.out_proj = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False), nn.Linear(D_MODEL, D_MODEL, bias=False)

    def forward(self, x, past_key_value, attn_bias):
        qkv = self.Wqkv(self.norm(x)).clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = qkv.chunk(3, dim=2)
        out, past_key_value = attention(query, key, value, past_key_value, 1 / math.sqrt(HEAD), attn_bias)
        return x + self.out_proj(out), past_key_value


class Model(nn.Module):
    def __init__(self, max_seq_len=32):
        super().__init__()
        self.wte = nn.Embedding(48, D_MODEL)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("attn_bias", build_alibi_bias(HEADS, max_seq_len), persistent=False)

    def forward(self, input_ids, past_key_values):
        x = self.wte(input_ids)
        for b_idx, block in enumerate(self.blocks):
            x, past_key_values[b_idx] = block(x, past_key_values[b_idx], self.attn_bias)
        return nn.functional.linear(x, self.wte.weight), past_key_values


def make():
    return Model()


def start(model):
    return [None] * len(model.blocks)


def feed(call, state, ids):
    return call(ids, list(state))


def caches(model, state):
    return [tensor for kv in state for tensor in kv]
