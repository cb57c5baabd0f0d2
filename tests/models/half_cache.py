"""Float32 everywhere but in the cache, which is float16: cast on the way in, and back on the way out."""

import torch
from torch import nn

EXPECT = "compressed"
DIM, HEADS, HEAD_DIM, MAX_LEN = 64, 2, 32, 32


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))
        self.cache = {name: torch.zeros(2, HEADS, MAX_LEN, HEAD_DIM, dtype=torch.float16) for name in ("k", "v")}

    def forward(self, x, pos: int):
        b, t, _ = x.shape
        q, k, v = (w(x).view(b, t, HEADS, HEAD_DIM).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        self.cache["k"][:, :, pos : pos + t] = k.to(torch.float16)
        self.cache["v"][:, :, pos : pos + t] = v.to(torch.float16)
        keys = self.cache["k"][:, :, : pos + t].to(q.dtype)
        values = self.cache["v"][:, :, : pos + t].to(q.dtype)
        scores = q @ keys.mT / HEAD_DIM**0.5
        scores = scores + torch.full_like(scores, float("-inf")).triu(pos + 1)
        return self.wo((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(48, DIM), nn.LayerNorm(DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, ids, pos: int):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(self.norm(x), pos)
        return self.out(x)


def make():
    return Model()


def start(model):
    return 0


def feed(call, state, ids):
    return call(ids, state), state + ids.shape[1]


def caches(model, state):
    return [tensor for layer in model.layers for tensor in layer.cache.values()]
