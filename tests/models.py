"""Small models, one for each way a program keeps a KV cache, and the conversation a test holds with one.

Each is plain PyTorch with dense behaviour. `Conversation` drives a model through calls of any length, compiled or
not; with `store` it is the reference twin of a compressed model: a dense cache that holds decoded codes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from tqcompile import formats, reference, tables

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


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    """Hugging Face's: [B, H, S, D] -> [B, H * times, S, D]."""
    batch, heads, length, dim = x.shape
    if times == 1:
        return x
    return x[:, :, None, :, :].expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)


def _groups(q, k) -> int:
    return q.shape[1] // k.shape[1]


def sdpa_mask(q, k, v, mask):
    times = _groups(q, k)
    return nn.functional.scaled_dot_product_attention(q, repeat_kv(k, times), repeat_kv(v, times), attn_mask=mask)


def sdpa_float_mask(q, k, v, mask):
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    return nn.functional.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)


def sdpa_gqa_scale(q, k, v, mask):
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)


def eager_matmul(q, k, v, mask):
    times = _groups(q, k)
    scores = torch.matmul(q, repeat_kv(k, times).transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, repeat_kv(v, times))


def eager_at(q, k, v, mask):
    times = _groups(q, k)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    scores = (q @ k.repeat_interleave(times, dim=1).mT) / (q.shape[-1] ** 0.5) + bias
    return torch.softmax(scores.float(), -1).type_as(q) @ v.repeat_interleave(times, dim=1)


def eager_einsum(q, k, v, mask):
    times = _groups(q, k)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, repeat_kv(k, times)) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, repeat_kv(v, times))


def softcap(q, k, v, mask):
    times = _groups(q, k)
    scores = (q @ repeat_kv(k, times).permute(0, 1, 3, 2)) * 0.25
    scores = torch.tanh(scores / 2.0) * 2.0
    return scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).type(q.dtype) @ repeat_kv(v, times)


def alibi(q, k, v, mask):
    times = _groups(q, k)
    slopes = torch.linspace(-0.5, -0.1, q.shape[1], device=q.device).view(1, -1, 1, 1).to(q.dtype)
    distance = torch.arange(k.shape[2], device=q.device).to(q.dtype)
    scores = q @ repeat_kv(k, times).transpose(-1, -2) * q.shape[-1] ** -0.5 + slopes * distance
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ repeat_kv(v, times)


def sinks(q, k, v, mask):
    times = _groups(q, k)
    scores = q @ repeat_kv(k, times).transpose(-1, -2) * q.shape[-1] ** -0.5
    column = torch.linspace(-1, 1, q.shape[1], device=q.device).to(q.dtype).reshape(1, -1, 1, 1)
    column = column.expand(q.shape[0], -1, q.shape[2], 1)
    weights = torch.cat([scores.masked_fill(~mask, float("-inf")), column], -1).softmax(-1)
    return weights[..., :-1] @ repeat_kv(v, times)


READERS: dict[str, Callable] = {
    reader.__name__: reader
    for reader in (
        sdpa_mask,
        sdpa_float_mask,
        sdpa_gqa_scale,
        eager_matmul,
        eager_at,
        eager_einsum,
        softcap,
        alibi,
        sinks,
    )
}


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


def fake_quantised(x: torch.Tensor, codec: str) -> torch.Tensor:
    """`x` [..., head_dim] as a cache of that codec gives it back."""
    format = formats.codec(codec)
    basis = tables.basis_matrix(format, x.shape[-1], x.device)
    planes = reference.encode(format, reference.rotate(x, basis))
    return reference.rotate_back(reference.decode(format, planes, x.shape[-1]), basis, x.dtype)


@dataclass
class Conversation:
    """Calls of a model, one after the other, on one cache.

    With `codecs` (keys, values) the model is the twin of a compressed one: what it stores is quantised and decoded.
    """

    model: Model
    call: Callable | None = None
    codecs: tuple[str, str] | None = None
    filled: int = 0
    state: object = None
    twin: dict = field(default_factory=dict)

    def __post_init__(self):
        self.call = self.model if self.call is None else self.call
        self._store(exact=False)

    def _store(self, exact: bool) -> None:
        if self.codecs is not None:
            store = unchanged if exact else lambda k, v: tuple(map(fake_quantised, (k, v), self.codecs))
            for block in self.model.blocks:
                block.store = store

    @torch.no_grad()
    def feed(self, x: torch.Tensor, exact: bool = False, eager: bool = False) -> torch.Tensor:
        """The model's output for x [B, T, EMBED].

        `exact`: the twin of a call that attends over its own unquantised tokens and encodes them afterwards.
        """
        call, tokens = self.model if eager else self.call, x.shape[1]
        self._store(exact)
        positions = torch.arange(self.filled, self.filled + tokens, device=x.device)
        if isinstance(self.model, Tuples):
            out, self.state = call(x, self.state)
        elif isinstance(self.model, Made):
            out, self.state = call(x, self.state, positions)
        elif isinstance(self.model, Buffers):
            out = call(x, positions)
        elif isinstance(self.model, Slices):
            out = call(x, self.filled)
        else:
            out = call(x)
        if exact and self.codecs is not None:
            self._quantise()
        self.filled += tokens
        return out

    def _quantise(self) -> None:
        if self.state is not None:
            self.state = tuple(tuple(map(fake_quantised, kv, self.codecs)) for kv in self.state)
        else:
            for tensor, codec in zip(self.caches(), self.codecs * self.model.shape.layers):
                tensor.copy_(fake_quantised(tensor, codec))

    def again(self) -> None:
        """Start another conversation in the same cache, without clearing it."""
        self.filled, self.state = 0, None
        for block in self.model.blocks:
            if hasattr(block, "filled"):
                block.filled.zero_()

    def reset(self) -> None:
        """Clear the cache and start again."""
        if not isinstance(self.model, (Tuples, Made)):
            for tensor in self.caches():
                tensor.zero_()
        self.again()

    def caches(self) -> list[torch.Tensor]:
        """The live caches, keys and values in turn."""
        if self.state is not None:
            return [tensor for kv in self.state for tensor in kv]
        if isinstance(self.model, Slices):
            return [tensor for block in self.model.blocks for tensor in (block.cache_k, block.cache_v)]
        if isinstance(self.model, (Tuples, Made)):
            return []
        return [tensor for block in self.model.blocks for tensor in (block.k_cache, block.v_cache)]


MODELS: dict[str, type[Model]] = {
    "tuples": Tuples,
    "buffers": Buffers,
    "slices": Slices,
    "counter": Counter,
    "made": Made,
}


def conversations(
    kind: str, shape: Shape, codecs: tuple[str, str], seed: int = 0, **options
) -> tuple[Conversation, Conversation]:
    """A compiled model with a compressed cache, and the twin it has to agree with."""
    torch.manual_seed(seed)
    model, twin = MODELS[kind](shape), MODELS[kind](shape)
    twin.load_state_dict(model.state_dict())
    model.requires_grad_(False), twin.requires_grad_(False)
    options = {"keys": codecs[0], "values": codecs[1], "inner": "eager", **options}
    compiled = torch.compile(model, backend="turboquant", options=options)
    return Conversation(model, compiled), Conversation(twin, codecs=codecs)
