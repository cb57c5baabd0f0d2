"""Groups of heads in one projection, `index_copy_` by positions, rows of a mask by `index_select`."""

import torch
from torch import nn
from torch.nn import functional as F

EXPECT = "compressed"
N_EMBD, N_HEAD, N_GROUPS, HEAD_SIZE, BLOCK = 64, 4, 2, 32, 32


class KVCache(nn.Module):
    def __init__(self, k_shape, v_shape):
        super().__init__()
        self.register_buffer("k", torch.zeros(k_shape), persistent=False)
        self.register_buffer("v", torch.zeros(v_shape), persistent=False)

    def forward(self, input_pos, k, v):
        self.k = self.k.to(k.dtype)
        self.v = self.v.to(v.dtype)
        k = self.k.index_copy_(2, input_pos, k)
        v = self.v.index_copy_(2, input_pos, v)
        return k, v

    def reset_parameters(self):
        nn.init.zeros_(self.k)
        nn.init.zeros_(self.v)


def apply_rope(x, cos, sin):
    x1, x2 = x[..., : x.size(-1) // 2], x[..., x.size(-1) // 2 :]
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(N_EMBD, (N_HEAD + 2 * N_GROUPS) * HEAD_SIZE)
        self.proj = nn.Linear(N_HEAD * HEAD_SIZE, N_EMBD)
        self.kv_cache = None

    def forward(self, x, cos, sin, mask, input_pos):
        B, T, _ = x.size()
        q_per_kv = N_HEAD // N_GROUPS
        qkv = self.attn(x).view(B, T, N_GROUPS, q_per_kv + 2, HEAD_SIZE).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((q_per_kv, 1, 1), dim=2)
        q, k, v = q.reshape(B, -1, T, HEAD_SIZE), k.reshape(B, -1, T, HEAD_SIZE), v.reshape(B, -1, T, HEAD_SIZE)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k, v = self.kv_cache(input_pos, k, v)
        k, v = k.repeat_interleave(q_per_kv, dim=1), v.repeat_interleave(q_per_kv, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=HEAD_SIZE**-0.5, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, N_HEAD * HEAD_SIZE))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.lm_head = nn.Embedding(48, N_EMBD), nn.Linear(N_EMBD, 48)
        self.h = nn.ModuleList(CausalSelfAttention() for _ in range(2))
        angles = torch.outer(torch.arange(BLOCK), 1e4 ** (-torch.arange(0, HEAD_SIZE, 2) / HEAD_SIZE)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        ones = torch.ones((BLOCK, BLOCK), dtype=torch.bool)
        self.register_buffer("mask_cache", torch.tril(ones).unsqueeze(0).unsqueeze(0), persistent=False)

    def set_kv_cache(self, batch_size):
        for block in self.h:
            shape = (batch_size, N_GROUPS, BLOCK, HEAD_SIZE)
            block.kv_cache = KVCache(shape, shape)

    def forward(self, idx, input_pos):
        cos, sin = self.cos.index_select(0, input_pos), self.sin.index_select(0, input_pos)
        mask = self.mask_cache.index_select(2, input_pos)
        x = self.wte(idx)
        for block in self.h:
            x = x + block(x, cos, sin, mask, input_pos)
        return self.lm_head(x)


def make():
    model = GPT()
    model.set_kv_cache(2)
    return model


def start(model):
    for block in model.h:
        block.kv_cache.reset_parameters()
    return torch.tensor([0])


def feed(call, state, ids):
    return call(ids, state + torch.arange(ids.size(1))), state + ids.size(1)


def caches(model, state):
    return [tensor for block in model.h for tensor in (block.kv_cache.k, block.kv_cache.v)]
