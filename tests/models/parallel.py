"""Attention beside the MLP, a rotary part of each head, one projection with heads outermost, and `baddbmm` by hand."""

import torch
from torch import nn

EXPECT = "compressed"
HIDDEN, HEADS, HEAD, ROTARY = 64, 2, 32, 16


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


class Attention(nn.Module):
    def __init__(self, max_positions=32):
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(HIDDEN, 3 * HEADS * HEAD), nn.Linear(HEADS * HEAD, HIDDEN)
        mask = torch.tril(torch.ones(max_positions, max_positions, dtype=torch.uint8)).bool()
        self.register_buffer("bias", mask.view(1, 1, max_positions, max_positions))
        freqs = torch.outer(torch.arange(max_positions).float(), 1e4 ** (-torch.arange(0, ROTARY, 2) / ROTARY))
        self.register_buffer("angles", torch.cat((freqs, freqs), dim=-1))

    def forward(self, hidden_states, layer_past, use_cache):
        qkv = self.query_key_value(hidden_states)
        qkv = qkv.view(*qkv.size()[:-1], HEADS, 3 * HEAD)
        query, key, value = (qkv[..., i * HEAD : (i + 1) * HEAD].permute(0, 2, 1, 3) for i in range(3))
        offset = layer_past[0].shape[-2] if layer_past is not None else 0
        angles = self.angles[offset : offset + key.shape[-2]]
        query, key = (
            torch.cat(
                (x[..., :ROTARY] * angles.cos() + rotate_half(x[..., :ROTARY]) * angles.sin(), x[..., ROTARY:]), -1
            )
            for x in (query, key)
        )
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=-2)
            value = torch.cat((layer_past[1], value), dim=-2)
        present = (key, value) if use_cache else None
        out = self._attn(query, key, value).permute(0, 2, 1, 3).contiguous()
        return self.dense(out.view(*out.size()[:-2], HEADS * HEAD)), present

    def _attn(self, query, key, value):
        batch, heads, query_length, head = query.size()
        key_length = key.size(-2)
        causal_mask = self.bias[:, :, key_length - query_length : key_length, :key_length]
        query = query.reshape(batch * heads, query_length, head)
        key = key.reshape(batch * heads, key_length, head)
        scores = torch.zeros(batch * heads, query_length, key_length, dtype=query.dtype, device=key.device)
        scores = torch.baddbmm(scores, query, key.transpose(1, 2), beta=1.0, alpha=head**-0.5)
        scores = scores.view(batch, heads, query_length, key_length)
        low = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
        weights = nn.functional.softmax(torch.where(causal_mask, scores, low), dim=-1).to(value.dtype)
        return torch.matmul(weights, value)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_in, self.embed_out = nn.Embedding(48, HIDDEN), nn.Linear(HIDDEN, 48, bias=False)
        self.attentions = nn.ModuleList(Attention() for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU()) for _ in range(2))

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        x, presents = self.embed_in(input_ids), ()
        past_key_values = past_key_values or (None,) * len(self.attentions)
        for attention, mlp, layer_past in zip(self.attentions, self.mlps, past_key_values):
            attn_output, present = attention(x, layer_past, use_cache)
            presents += (present,)
            x = mlp(x) + attn_output + x
        return {"logits": self.embed_out(x), "past_key_values": presents}


def make():
    return Model()


def start(model):
    return None


def feed(call, state, ids):
    out = call(ids, past_key_values=state)
    return out["logits"], out["past_key_values"]


def caches(model, state):
    return [tensor for kv in state for tensor in kv]
