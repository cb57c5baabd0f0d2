"""A line of debugging left in a layer, between the cache's update and attention: two graphs share each cache."""

import torch
from torch import nn
from torch.nn import functional as F

EXPECT = "compressed"
DIM, HEADS, HEAD_DIM, MAX_LEN = 64, 2, 32, 32


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.register_buffer("k_cache", torch.zeros(2, HEADS, MAX_LEN, HEAD_DIM), persistent=False)
        self.register_buffer("v_cache", torch.zeros(2, HEADS, MAX_LEN, HEAD_DIM), persistent=False)

    def forward(self, x, positions):
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        print("cache:", tuple(self.k_cache.shape), "tokens:", x.shape[1])
        mask = torch.arange(MAX_LEN) <= positions[:, None]
        y = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask)
        return self.proj(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(48, DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, ids, positions):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x, positions)
        return self.head(x)


def make():
    return Model()


def start(model):
    return 0


def feed(call, state, ids):
    return call(ids, torch.arange(state, state + ids.shape[1])), state + ids.shape[1]


def caches(model, state):
    return [tensor for layer in model.layers for tensor in (layer.k_cache, layer.v_cache)]
