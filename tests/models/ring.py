"""A window in a ring of slots: attends over the ring and its own tokens, and writes these at place % window."""

import torch
from torch import nn

EXPECT = "compressed"
DIM, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 4, 2, 32, 6


class RotatingCache:
    """Slot s of a layer holds the last token whose place is s modulo the window."""

    def __init__(self, n_layers, bsz):
        self.k = [torch.zeros(bsz, WINDOW, KV_HEADS, HEAD_DIM) for _ in range(n_layers)]
        self.v = [torch.zeros(bsz, WINDOW, KV_HEADS, HEAD_DIM) for _ in range(n_layers)]

    def attended(self, layer, xk, xv):
        return torch.cat([self.k[layer], xk], dim=1), torch.cat([self.v[layer], xv], dim=1)

    def update(self, layer, xk, xv, positions):
        slots = positions[-WINDOW:] % WINDOW
        self.k[layer].index_copy_(1, slots, xk[:, -WINDOW:])
        self.v[layer].index_copy_(1, slots, xv[:, -WINDOW:])


def window_mask(positions):
    """[T, WINDOW + T]: what lies in the ring before this call, then the tokens of this call."""
    first, slots = positions[0], torch.arange(WINDOW)
    held = first - 1 - (first - 1 - slots) % WINDOW
    places = torch.cat([held, positions])
    age = positions[:, None] - places[None, :]
    return (age >= 0) & (age < WINDOW) & (places >= 0)[None, :]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wo = nn.Linear(DIM, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, DIM)
        self.wk, self.wv = nn.Linear(DIM, KV_HEADS * HEAD_DIM), nn.Linear(DIM, KV_HEADS * HEAD_DIM)

    def forward(self, x, layer, cache, positions, mask):
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, HEADS, HEAD_DIM)
        xk = self.wk(x).view(bsz, seqlen, KV_HEADS, HEAD_DIM)
        xv = self.wv(x).view(bsz, seqlen, KV_HEADS, HEAD_DIM)
        key, value = cache.attended(layer, xk, xv)
        cache.update(layer, xk, xv, positions)
        key = torch.repeat_interleave(key, HEADS // KV_HEADS, dim=2)
        value = torch.repeat_interleave(value, HEADS // KV_HEADS, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", xq, key) * HEAD_DIM**-0.5
        probs = torch.where(mask, scores, torch.finfo(scores.dtype).min).softmax(dim=-1)
        return self.wo(torch.einsum("bhts,bshd->bthd", probs, value).reshape(bsz, seqlen, -1))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(48, DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, ids, positions, cache):
        x, mask = self.embed(ids), window_mask(positions)
        for at, layer in enumerate(self.layers):
            x = x + layer(x, at, cache, positions, mask)
        return self.out(x)


def make():
    return Transformer()


def start(model):
    return {"cache": RotatingCache(2, 2), "seen": 0}


def feed(call, state, ids):
    positions = torch.arange(state["seen"], state["seen"] + ids.shape[1])
    logits = call(ids, positions, state["cache"])
    return logits, {**state, "seen": state["seen"] + ids.shape[1]}


def caches(model, state):
    return [*state["cache"].k, *state["cache"].v]
