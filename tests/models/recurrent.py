"""No tokens are kept: a buffer [B, H, D, D] decays and takes in outer products, by `copy_` after it was read."""

import torch
from torch import nn

EXPECT = "dense"
REFUSED = ("it is replaced by what is computed from it",)
DIM, HEADS, HEAD_DIM = 64, 2, 32


class Retention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(DIM, HEADS * HEAD_DIM, bias=False) for _ in range(3))
        self.g_proj, self.out_proj = nn.Linear(DIM, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, DIM)
        self.register_buffer("decay", 1 - 2.0 ** (-2 - torch.arange(HEADS, dtype=torch.float32)))
        self.register_buffer("state", torch.zeros(2, HEADS, HEAD_DIM, HEAD_DIM), persistent=False)

    def heads(self, x):
        return x.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)

    def forward(self, x):
        n = x.shape[1]
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)) * HEAD_DIM**-0.5, self.heads(self.v_proj(x))
        age = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        weight = (self.decay[:, None, None] ** age.clamp(min=0)).masked_fill(age < 0, 0)
        inner = (q @ k.transpose(-1, -2) * weight) @ v
        carried = self.decay[:, None] ** torch.arange(1, n + 1)
        inner = inner + (q * carried[..., None]) @ self.state
        left = (self.decay[:, None] ** torch.arange(n - 1, -1, -1))[..., None]
        update = (k * left).transpose(-1, -2) @ v
        self.state.copy_(self.state * self.decay[:, None, None] ** n + update)
        out = nn.functional.rms_norm(inner, (HEAD_DIM,)).transpose(1, 2).reshape(*x.shape[:2], -1)
        return self.out_proj(nn.functional.silu(self.g_proj(x)) * out)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(48, DIM), nn.Linear(DIM, 48)
        self.layers = nn.ModuleList(Retention() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def make():
    return Model()


def start(model):
    for layer in model.layers:
        layer.state.zero_()


def feed(call, state, ids):
    return call(ids), state


def caches(model, state):
    return [layer.state for layer in model.layers]
