"""Incremental state in a dict by name: keys saved as [B, H, S, D], worked on as [B*H, S, D] through `bmm`."""

import torch
from torch import nn
from torch.nn import functional as F

EXPECT = "dense"
REFUSED = ("matmul reads it in a way that no attention pattern knows",)
EMBED, HEADS, HEAD = 64, 2, 32


class MultiheadAttention(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(EMBED, EMBED) for _ in range(3))
        self.out_proj = nn.Linear(EMBED, EMBED)

    def forward(self, query, incremental_state, attn_mask):
        tgt_len, bsz, _ = query.size()
        q, k, v = self.q_proj(query) * HEAD**-0.5, self.k_proj(query), self.v_proj(query)
        q, k, v = (t.contiguous().view(-1, bsz * HEADS, HEAD).transpose(0, 1) for t in (q, k, v))
        saved_state = incremental_state.get(self.name, {})
        if "prev_key" in saved_state:
            prev_key = saved_state["prev_key"].view(bsz * HEADS, -1, HEAD)
            k = torch.cat([prev_key, k], dim=1)
        if "prev_value" in saved_state:
            prev_value = saved_state["prev_value"].view(bsz * HEADS, -1, HEAD)
            v = torch.cat([prev_value, v], dim=1)
        saved_state["prev_key"] = k.view(bsz, HEADS, -1, HEAD)
        saved_state["prev_value"] = v.view(bsz, HEADS, -1, HEAD)
        incremental_state[self.name] = saved_state
        attn_weights = torch.bmm(q, k.transpose(1, 2))
        attn_weights = attn_weights + attn_mask.unsqueeze(0)
        attn_probs = F.softmax(attn_weights, dim=-1, dtype=torch.float32).type_as(attn_weights)
        attn = torch.bmm(attn_probs, v).transpose(0, 1).contiguous().view(tgt_len, bsz, EMBED)
        return self.out_proj(attn)


class TransformerDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.output_projection = nn.Embedding(48, EMBED), nn.Linear(EMBED, 48, bias=False)
        self.layers = nn.ModuleList(MultiheadAttention(f"layers.{at}.self_attn") for at in range(2))

    def forward(self, prev_output_tokens, incremental_state):
        past, n = 0, prev_output_tokens.shape[1]
        if incremental_state:
            past = incremental_state["layers.0.self_attn"]["prev_key"].size(2)
        mask = torch.triu(torch.full((n, past + n), float("-inf")), past + 1)
        x = self.embed_tokens(prev_output_tokens).transpose(0, 1)
        for layer in self.layers:
            x = x + layer(x, incremental_state, mask)
        return self.output_projection(x.transpose(0, 1))


def make():
    return TransformerDecoder()


def start(model):
    return {}


def feed(call, state, ids):
    return call(ids, state), state


def caches(model, state):
    return [tensor for saved in state.values() for tensor in saved.values()]
