"""Batch and heads in one dimension: keys [B*H, D, S], values [B*H, S, D], and a position bias inside `baddbmm`."""

import torch
from torch import nn
from torch.nn import functional as F

EXPECT = "partly"
REFUSED = ("its tokens lie along the last dimension",)
HIDDEN, HEADS, HEAD = 64, 2, 32


def build_alibi(length, batch_size):
    slopes = torch.pow(2.0, -torch.arange(1, HEADS + 1) * 4.0)
    alibi = slopes[:, None] * torch.arange(length)[None, :]
    return alibi.repeat(batch_size, 1).view(batch_size * HEADS, 1, length)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states, alibi, attention_mask, layer_past):
        batch_size, q_length, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch_size, q_length, HEADS, 3, HEAD)
        query, key, value = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        query = query.transpose(1, 2).reshape(batch_size * HEADS, q_length, HEAD)
        key = key.permute(0, 2, 3, 1).reshape(batch_size * HEADS, HEAD, q_length)
        value = value.transpose(1, 2).reshape(batch_size * HEADS, q_length, HEAD)
        if layer_past is not None:
            past_key, past_value = layer_past
            key = torch.cat((past_key, key), dim=2)
            value = torch.cat((past_value, value), dim=1)
        kv_length = key.shape[-1]
        scores = alibi.baddbmm(batch1=query, batch2=key, beta=1.0, alpha=HEAD**-0.5)
        scores = scores.view(batch_size, HEADS, q_length, kv_length).to(torch.float)
        scores = torch.masked_fill(scores, attention_mask, torch.finfo(scores.dtype).min)
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        context = torch.bmm(probs.view(batch_size * HEADS, q_length, kv_length), value)
        context = context.view(batch_size, HEADS, q_length, HEAD).permute(0, 2, 1, 3)
        return self.dense(context.reshape(batch_size, q_length, HIDDEN)), (key, value)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings, self.norm = nn.Embedding(48, HIDDEN), nn.LayerNorm(HIDDEN)
        self.h = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, input_ids, past_key_values=None):
        batch, length = input_ids.shape
        if past_key_values is None:
            past_key_values = tuple([None] * len(self.h))
        seen = past_key_values[0][0].shape[2] if past_key_values[0] is not None else 0
        alibi = build_alibi(seen + length, batch)
        places = torch.arange(seen + length)
        attention_mask = (places[None, :] > places[seen:, None])[None, None].expand(batch, 1, length, seen + length)
        x, presents = self.norm(self.word_embeddings(input_ids)), ()
        for block, layer_past in zip(self.h, past_key_values):
            out, present = block(x, alibi, attention_mask, layer_past)
            x, presents = x + out, (*presents, present)
        return F.linear(x, self.word_embeddings.weight), presents


def make():
    return Model()


def start(model):
    return None


def feed(call, state, ids):
    return call(ids, state)


def caches(model, state):
    return [tensor for kv in state for tensor in kv]
