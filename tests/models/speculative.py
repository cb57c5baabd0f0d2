"""Guesses are fed behind the tokens that are sure; what they left in the cache is cut off before the next call."""

import torch
from torch import nn
from torch.nn import functional as F

EXPECT = "compressed"
DIM, HEADS, HEAD_DIM, DRAFT = 64, 2, 32, 2


class DynamicCache:
    def __init__(self):
        self.layers = []

    def update(self, k, v, at):
        if at == len(self.layers):
            self.layers.append((k, v))
        else:
            self.layers[at] = tuple(torch.cat(pair, dim=-2) for pair in zip(self.layers[at], (k, v)))
        return self.layers[at]

    def crop(self, length):
        self.layers = [tuple(tensor[..., :length, :] for tensor in kv) for kv in self.layers]


class Attention(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.at, self.qkv, self.o = at, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, cache):
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        k, v = cache.update(k, v, self.at)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(48, DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(Attention(at) for at in range(2))

    def forward(self, ids, cache):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x, cache)
        return self.out(x)


def make():
    return Model()


def start(model):
    return DynamicCache(), 0


def feed(call, state, ids):
    cache, sure = state
    cache.crop(sure)
    logits = call(torch.cat([ids, ids[:, :1].expand(-1, DRAFT)], dim=1), cache)
    return logits[:, :-DRAFT], (cache, sure + ids.shape[1])


def caches(model, state):
    return [tensor for kv in state[0].layers for tensor in kv]
