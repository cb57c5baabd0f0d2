"""Encoder and decoder with relative position buckets: unscaled scores, a bias a head, keys of the encoder made once."""

import math

import torch
from torch import nn

EXPECT = "compressed"
D_MODEL, HEADS, D_KV, BUCKETS = 64, 2, 32, 8


def bucket(distance, max_distance=32):
    """Exact for near places, logarithmic for far ones."""
    distance, max_exact = distance.clamp(min=0), BUCKETS // 2
    far = torch.log(distance.float() / max_exact) / math.log(max_distance / max_exact) * (BUCKETS - max_exact)
    far = torch.min(max_exact + far.to(torch.long), torch.full_like(distance, BUCKETS - 1))
    return torch.where(distance < max_exact, distance, far)


class Attention(nn.Module):
    def __init__(self, has_relative_attention_bias):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D_MODEL, HEADS * D_KV, bias=False) for _ in range(4))
        self.relative_attention_bias = nn.Embedding(BUCKETS, HEADS) if has_relative_attention_bias else None

    def shape(self, x):
        return x.view(x.shape[0], -1, HEADS, D_KV).transpose(1, 2)

    def forward(self, hidden, memory=None, past=None, bias=None):
        q = self.shape(self.q(hidden))
        if memory is not None and past is not None:
            k, v = past
        else:
            source = hidden if memory is None else memory
            k, v = self.shape(self.k(source)), self.shape(self.v(source))
            if past is not None:
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        scores = torch.matmul(q, k.transpose(3, 2))
        if bias is None and self.relative_attention_bias is not None:
            context = torch.arange(k.shape[2])[-q.shape[2] :, None]
            places = bucket(context - torch.arange(k.shape[2])[None, :])
            bias = self.relative_attention_bias(places).permute([2, 0, 1]).unsqueeze(0)
            bias = bias + torch.where(context < torch.arange(k.shape[2])[None, :], torch.finfo(q.dtype).min, 0.0)
        scores = scores if bias is None else scores + bias
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous().view(hidden.shape[0], -1, HEADS * D_KV)
        return self.o(out), (k, v), bias


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.lm_head = nn.Embedding(48, D_MODEL), nn.Linear(D_MODEL, 48, bias=False)
        self.self_attention = nn.ModuleList(Attention(at == 0) for at in range(2))
        self.cross_attention = nn.ModuleList(Attention(False) for _ in range(2))

    def forward(self, ids, memory, past=None):
        x, present, bias = self.shared(ids), [], None
        for at, (own, cross) in enumerate(zip(self.self_attention, self.cross_attention)):
            before = past[at] if past is not None else (None, None)
            out, kept, bias = own(x, past=before[0], bias=bias)
            x = x + out
            out, kept_cross, _ = cross(x, memory, past=before[1])
            x = x + out
            present.append((kept, kept_cross))
        return self.lm_head(x * D_MODEL**-0.5), present


def make():
    return Decoder()


def start(model):
    return torch.randn(2, 9, D_MODEL, generator=torch.Generator().manual_seed(3)), None


def feed(call, state, ids):
    memory, past = state
    logits, present = call(ids, memory, past)
    return logits, (memory, present)


def caches(model, state):
    return [tensor for layer in state[1] for kv in layer for tensor in kv]
