"""Small models, one for each way a program keeps a KV cache: plain PyTorch with dense behaviour."""

from dataclasses import dataclass

import torch
from readers import READERS
from torch import nn

EMBED = 16
LENGTH = 24


@dataclass(frozen=True)
class Shape:
    """The numbers of a model; `reader` is a name in `READERS`."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    layers: int = 2
    length: int = LENGTH
    dtype: torch.dtype = torch.float32
    reader: str = "sdpa_mask"


def unchanged(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a dense cache does to the tokens it stores."""
    return k, v


def causal(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Bool [1, 1, T, length]: each query sees the places up to its own."""
    return (torch.arange(length, device=positions.device) <= positions.unsqueeze(-1))[None, None]


class Block(nn.Module):
    """One attention layer with a residual; a subclass says how it keeps its cache."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, self.reader, self.store = shape, READERS[shape.reader], unchanged
        self.wq = nn.Linear(EMBED, shape.heads * shape.head_dim, dtype=shape.dtype)
        self.wk = nn.Linear(EMBED, shape.kv_heads * shape.head_dim, dtype=shape.dtype)
        self.wv = nn.Linear(EMBED, shape.kv_heads * shape.head_dim, dtype=shape.dtype)
        self.wo = nn.Linear(shape.heads * shape.head_dim, EMBED, dtype=shape.dtype)

    def project(self, x):
        """q [B, H, T, D], k and v [B, Hkv, T, D]."""
        q, k, v = (
            w(x).view(*x.shape[:2], -1, self.shape.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        k, v = self.store(k, v)
        return q, k, v

    def mixed(self, x, out):
        return x + self.wo(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class Model(nn.Module):
    """A stack of blocks."""

    block: type[Block]

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(self.block(shape) for _ in range(shape.layers))

    def forward(self, x, *state):
        for block in self.blocks:
            x = block(x, *state)
        return x


class TupleBlock(Block):
    def forward(self, x, past):
        q, k, v = self.project(x)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=-2)
        positions = torch.arange(k.shape[2] - x.shape[1], k.shape[2], device=x.device)
        return self.mixed(x, self.reader(q, k, v, causal(positions, k.shape[2]))), (k, v)


class Tuples(Model):
    """nanoGPT with a cache: a tuple of past keys and values goes in, a longer one comes out."""

    block = TupleBlock

    def forward(self, x, past=None):
        present = []
        for at, block in enumerate(self.blocks):
            x, kv = block(x, past[at] if past is not None else None)
            present.append(kv)
        return x, tuple(present)


class BufferBlock(Block):
    def __init__(self, shape: Shape):
        super().__init__(shape)
        size = (shape.batch, shape.kv_heads, shape.length, shape.head_dim)
        self.register_buffer("k_cache", torch.zeros(size, dtype=shape.dtype))
        self.register_buffer("v_cache", torch.zeros(size, dtype=shape.dtype))

    def forward(self, x, input_pos, mask):
        q, k, v = self.project(x)
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.mixed(x, self.reader(q, self.k_cache, self.v_cache, mask))


class Buffers(Model):
    """gpt-fast: registered buffers, an indexed assignment, rows of a mask of all places."""

    block = BufferBlock

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.register_buffer("causal_mask", torch.tril(torch.ones(shape.length, shape.length, dtype=torch.bool)))

    def forward(self, x, input_pos):
        return super().forward(x, input_pos, self.causal_mask[None, None, input_pos])


class SliceBlock(Block):
    def __init__(self, shape: Shape):
        super().__init__(shape)
        size = (shape.batch, shape.length, shape.kv_heads, shape.head_dim)
        self.cache_k, self.cache_v = torch.zeros(size, dtype=shape.dtype), torch.zeros(size, dtype=shape.dtype)

    def forward(self, x, start: int):
        bsz, seqlen, _ = x.shape
        q, k, v = self.project(x)
        self.cache_k[:bsz, start : start + seqlen] = k.transpose(1, 2)
        self.cache_v[:bsz, start : start + seqlen] = v.transpose(1, 2)
        keys = self.repeat(self.cache_k[:bsz, : start + seqlen]).transpose(1, 2)
        values = self.repeat(self.cache_v[:bsz, : start + seqlen]).transpose(1, 2)
        scores = torch.matmul(q, keys.transpose(2, 3)) / self.shape.head_dim**0.5
        bias = torch.full((seqlen, seqlen), float("-inf"), device=x.device).triu(1)
        scores = scores + torch.hstack([torch.zeros(seqlen, start, device=x.device), bias]).type_as(q)
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(q)
        return self.mixed(x, torch.matmul(weights, values))

    def repeat(self, x):
        batch, length, heads, dim = x.shape
        times = self.shape.heads // heads
        if times == 1:
            return x
        return x[:, :, :, None, :].expand(batch, length, heads, times, dim).reshape(batch, length, heads * times, dim)


class Slices(Model):
    """The original Llama: plain attributes [B, S, H, D], slice assignment, reads of the filled part."""

    block = SliceBlock


class CounterBlock(BufferBlock):
    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        q, k, v = self.project(x)
        positions = torch.arange(x.shape[1], device=x.device) + self.filled
        self.filled.add_(x.shape[1])
        self.k_cache.index_copy_(2, positions, k)
        self.v_cache.index_copy_(2, positions, v)
        return self.mixed(x, self.reader(q, self.k_cache, self.v_cache, causal(positions, self.k_cache.shape[2])))


class Counter(Model):
    """A static cache that counts its own tokens in a tensor, written by index_copy_."""

    block = CounterBlock


class MadeBlock(Block):
    def forward(self, x, cache, positions):
        q, k, v = self.project(x)
        if cache is None:
            size = (x.shape[0], self.shape.kv_heads, self.shape.length, self.shape.head_dim)
            cache = (x.new_zeros(size), x.new_zeros(size))
        cache[0][:, :, positions] = k
        cache[1][:, :, positions] = v
        return self.mixed(x, self.reader(q, *cache, causal(positions, self.shape.length))), cache


class Made(Model):
    """The first call makes the cache inside the graph; later ones write into it."""

    block = MadeBlock

    def forward(self, x, caches, positions):
        made = []
        for at, block in enumerate(self.blocks):
            x, cache = block(x, caches[at] if caches is not None else None, positions)
            made.append(cache)
        return x, tuple(made)


MODELS: dict[str, type[Model]] = {
    "tuples": Tuples,
    "buffers": Buffers,
    "slices": Slices,
    "counter": Counter,
    "made": Made,
}
