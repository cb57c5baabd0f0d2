"""The slot of each token as a one-hot row: the cache is multiplied by what stays, and the new tokens are added."""

import torch
from torch import nn
from torch.nn import functional as F

EXPECT = "dense"
REFUSED = ("it is replaced by what is computed from it",)
DIM, HEADS, HEAD_DIM, MAX_LEN = 64, 2, 32, 32


class DecodeAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, DIM)
        for name in ("cached_key", "cached_value"):
            self.register_buffer(name, torch.zeros(2, HEADS, MAX_LEN, HEAD_DIM), persistent=False)
        self.register_buffer("cache_index", torch.tensor(0), persistent=False)

    def forward(self, x):
        b, t, _ = x.shape
        query, key, value = self.qkv(x).view(b, t, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        slots = self.cache_index + torch.arange(t)
        one_hot = F.one_hot(slots, MAX_LEN).to(key.dtype)
        stays = (1 - one_hot.sum(dim=0))[None, None, :, None]
        self.cached_key.copy_(self.cached_key * stays + torch.einsum("ts,bhtd->bhsd", one_hot, key))
        self.cached_value.copy_(self.cached_value * stays + torch.einsum("ts,bhtd->bhsd", one_hot, value))
        self.cache_index.add_(t)
        mask = torch.arange(MAX_LEN)[None, :] <= slots[:, None]
        out = F.scaled_dot_product_attention(query, self.cached_key, self.cached_value, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.logits = nn.Embedding(48, DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(DecodeAttention() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.logits(x)


def make():
    return Model()


def start(model):
    for layer in model.layers:
        layer.cache_index.zero_()


def feed(call, state, ids):
    return call(ids), state


def caches(model, state):
    return [tensor for layer in model.layers for tensor in (layer.cached_key, layer.cached_value)]
