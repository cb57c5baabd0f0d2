"""Speech to text: a dict from projection to tensor that forward hooks fill, also with what the encoder said, once."""

import torch
from torch import nn

EXPECT = "dense"
# What the encoder said is made by the first graph, and kept by none.
REFUSED = ("it has 3 dimensions", "attention reads it, and no graph that was compiled keeps tokens in it")
STATE, HEADS = 64, 2


class MultiHeadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(STATE, STATE), nn.Linear(STATE, STATE, bias=False)
        self.value, self.out = nn.Linear(STATE, STATE), nn.Linear(STATE, STATE)

    def forward(self, x, xa=None, mask=None, kv_cache=None):
        q = self.query(x)
        if kv_cache is None or xa is None or self.key not in kv_cache:
            # With hooks in place these come back longer than they went in.
            k = self.key(x if xa is None else xa)
            v = self.value(x if xa is None else xa)
        else:
            k, v = kv_cache[self.key], kv_cache[self.value]
        return self.out(self.qkv_attention(q, k, v, mask))

    def qkv_attention(self, q, k, v, mask):
        _, n_ctx, n_state = q.shape
        scale = (n_state // HEADS) ** -0.25
        q = q.view(*q.shape[:2], HEADS, -1).permute(0, 2, 1, 3) * scale
        k = k.view(*k.shape[:2], HEADS, -1).permute(0, 2, 3, 1) * scale
        v = v.view(*v.shape[:2], HEADS, -1).permute(0, 2, 1, 3)
        qk = q @ k
        if mask is not None:
            offset = qk.shape[-1] - n_ctx
            qk = qk + mask[offset : offset + n_ctx, : qk.shape[-1]]
        w = torch.softmax(qk.float(), dim=-1).to(q.dtype)
        return (w @ v).permute(0, 2, 1, 3).flatten(start_dim=2)


class TextDecoder(nn.Module):
    def __init__(self, n_ctx=32):
        super().__init__()
        self.token_embedding = nn.Embedding(48, STATE)
        self.positional_embedding = nn.Parameter(torch.zeros(n_ctx, STATE))
        self.attn = nn.ModuleList(MultiHeadAttention() for _ in range(2))
        self.cross_attn = nn.ModuleList(MultiHeadAttention() for _ in range(2))
        self.register_buffer("mask", torch.full((n_ctx, n_ctx), float("-inf")).triu_(1), persistent=False)
        self.kv_cache = {}
        for block in self.attn:
            for projection in (block.key, block.value):
                projection.register_forward_hook(self.save_to_cache)
        for block in self.cross_attn:
            for projection in (block.key, block.value):
                projection.register_forward_hook(self.save_to_cache)

    def save_to_cache(self, module, _, output):
        if module not in self.kv_cache:
            self.kv_cache[module] = output
        else:
            self.kv_cache[module] = torch.cat([self.kv_cache[module], output], dim=1).detach()
        return self.kv_cache[module]

    def forward(self, x, xa):
        offset = next(iter(self.kv_cache.values())).shape[1] if self.kv_cache else 0
        x = self.token_embedding(x) + self.positional_embedding[offset : offset + x.shape[-1]]
        for attn, cross_attn in zip(self.attn, self.cross_attn):
            x = x + attn(x, mask=self.mask, kv_cache=self.kv_cache)
            x = x + cross_attn(x, xa, kv_cache=self.kv_cache)
        return (x @ torch.transpose(self.token_embedding.weight, 0, 1)).float()


def make():
    return TextDecoder()


def start(model):
    model.kv_cache.clear()
    return torch.randn(2, 9, STATE, generator=torch.Generator().manual_seed(3))


def feed(call, state, ids):
    return call(ids, state), state


def caches(model, state):
    return list(model.kv_cache.values())
