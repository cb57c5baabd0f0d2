"""A check of the scores by `.item()` in front of the softmax breaks the graph: two graphs read each layer's cache."""

import torch
from torch import nn

EXPECT = "compressed"
DIM, HEADS, HEAD_DIM = 64, 2, 32


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, past):
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        scores = q.matmul(k.transpose(-1, -2)) / HEAD_DIM**0.5
        if not scores.isfinite().all().item():
            raise FloatingPointError("attention overflowed")
        ahead = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool).triu(k.shape[2] - x.shape[1] + 1)
        y = scores.masked_fill(ahead, float("-inf")).softmax(dim=-1).matmul(v)
        return self.proj(y.transpose(1, 2).flatten(2)), (k, v)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(48, DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, ids, past):
        x, present = self.embed(ids), []
        for layer, kv in zip(self.layers, past):
            out, kv = layer(x, kv)
            x = x + out
            present.append(kv)
        return self.head(x), present


def make():
    return Model()


def start(model):
    return [None] * len(model.layers)


def feed(call, state, ids):
    return call(ids, state)


def caches(model, state):
    return [tensor for kv in state for tensor in kv]
