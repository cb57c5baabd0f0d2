"""Every option of attention, and every way to name the tokens, reads the codes as dense attention reads their numbers.

Keys and values differ in width, codec and basis, so that neither can stand for the other.
"""

import pytest
import torch
from conversations import fake_quantised

import tqcompile

F = torch.nn.functional
sdpa = F.scaled_dot_product_attention
LOSSLESS, LOSSY = ("identity", "identity"), ("turboquant:4", "q8_0")
KEY_SIZE, VALUE_SIZE = (2, 4, 9, 32), (2, 4, 9, 64)


class Cache(torch.nn.Module):
    """Two buffers [B, H, S, D], or [B, S, H, D] with `tokens_first`, that a call writes into before it reads them."""

    def __init__(self, read, tokens_first=False):
        super().__init__()
        self.read, self.tokens_first = read, tokens_first
        for name, size in (("k", KEY_SIZE), ("v", VALUE_SIZE)):
            # Half full of other numbers: a token read at the wrong place must not be one that reads as nothing.
            dense = torch.randn(size, generator=torch.Generator().manual_seed(7))
            self.register_buffer(name, dense.transpose(1, 2).contiguous() if tokens_first else dense)

    def forward(self, q, k, v, at, mask):
        if self.tokens_first:
            self.k[:, at], self.v[:, at] = k.transpose(1, 2), v.transpose(1, 2)
            return self.read(q, self.k.transpose(1, 2), self.v.transpose(1, 2), mask)
        self.k[:, :, at], self.v[:, :, at] = k, v
        return self.read(q, self.k, self.v, mask)


def calls(heads=4):
    generator = torch.Generator().manual_seed(3)
    for start in (1, 5):
        q, k = (torch.randn(2, count, 3, 32, generator=generator) for count in (heads, 4))
        v = torch.randn(2, 4, 3, 64, generator=generator)
        yield q, k, v, torch.arange(start, start + 3), torch.rand(2, heads, 3, 9, generator=generator) < 0.7


def compare(read, codecs, heads=4, tokens_first=False, decoded=False):
    """Both calls of the compiled model and of its twin, whose dense cache holds decoded codes.

    `decoded`: some reader is one that no rule knows.
    """
    model, twin = Cache(read, tokens_first), Cache(read, tokens_first)
    for tensor, codec in zip((twin.k, twin.v), codecs):
        tensor.copy_(fake_quantised(tensor, codec))
    options = {"keys": codecs[0], "values": codecs[1], "inner": "eager", "strict": True}
    compiled = torch.compile(model, backend="turboquant", options=options)
    for q, k, v, at, mask in calls(heads):
        stored = map(fake_quantised, (k, v), codecs)
        with torch.no_grad():
            torch.testing.assert_close(compiled(q, k, v, at, mask), twin(q, *stored, at, mask), rtol=1e-4, atol=1e-5)
    report = tqcompile.report(model)
    assert isinstance(model.k, tqcompile.CompressedKV) and isinstance(model.v, tqcompile.CompressedKV)
    assert sum(graph.reads for graph in report.graphs) and bool(report.fallbacks) == decoded


def bias(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) + torch.arange(9) / 4


PLACES = torch.randint(9, (2, 4, 5, 1), generator=torch.Generator().manual_seed(5))

ATTENTIONS = {
    "no option": lambda q, k, v, mask: sdpa(q, k, v),
    "a mask for each head": lambda q, k, v, mask: sdpa(q, k, v, mask),
    "a mask of one row": lambda q, k, v, mask: sdpa(q, k, v, attn_mask=mask[:1, :1, :1]),
    "a mask for each row of a batch": lambda q, k, v, mask: sdpa(q, k, v, attn_mask=mask[:, :1]),
    "a bias": lambda q, k, v, mask: sdpa(q, k, v, bias(mask)),
    "a scale": lambda q, k, v, mask: sdpa(q, k, v, scale=0.6),
    "a scale and a mask": lambda q, k, v, mask: sdpa(q, k, v, mask, 0.0, False, scale=0.6),
    "causal": lambda q, k, v, mask: sdpa(q, k[:, :, :3], v[:, :, :3], is_causal=True),
    "causal with fewer queries than tokens": lambda q, k, v, mask: sdpa(q, k, v, is_causal=True),
    "causal with more queries than tokens": lambda q, k, v, mask: sdpa(q, k[:, :, :2], v[:, :, :2], is_causal=True),
    "causal by position": lambda q, k, v, mask: sdpa(q, k, v, None, 0.0, True, scale=0.6),
    "one query": lambda q, k, v, mask: sdpa(q[:, :, -1:], k, v, mask[:, :, -1:]),
    "tokens from within": lambda q, k, v, mask: sdpa(q, k[:, :, 2:8], v[:, :, 2:8], mask[..., 2:8]),
    "narrowed tokens": lambda q, k, v, mask: sdpa(q, k.narrow(2, 3, 4), v.narrow(2, 3, 4), mask[..., 3:7]),
    "tokens that an index names": lambda q, k, v, mask: sdpa(
        q, *(x.gather(2, PLACES.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    ),
    "keys and values at different places": lambda q, k, v, mask: sdpa(q, k[:, :, 1:7], v[:, :, 3:]),
    "some of the heads": lambda q, k, v, mask: sdpa(q[:, :2], k[:, 2:], v[:, 2:]),
    "one row of the batch": lambda q, k, v, mask: sdpa(q[1:], k[1:], v[1:], mask[1:]),
}

PRODUCTS = {
    "softmax": lambda s, mask: s.softmax(-1),
    "scale": lambda s, mask: (s * 0.6).softmax(-1),
    "mask": lambda s, mask: (s / 32**0.5).masked_fill(~mask, float("-inf")).softmax(-1),
    "bias": lambda s, mask: (s * 0.2 + bias(mask)).softmax(-1),
    "softcap": lambda s, mask: (torch.tanh(s / 3) * 3).masked_fill(~mask, -1e9).softmax(-1),
    "no softmax": lambda s, mask: s / 9,
}

EVERY_CODEC = pytest.mark.parametrize("codecs", [LOSSLESS, LOSSY], ids="/".join)
EVERY_ORDER = pytest.mark.parametrize("tokens_first", [False, True])


@EVERY_ORDER
@EVERY_CODEC
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_reads_codes_as_dense_numbers(name, codecs, tokens_first):
    compare(ATTENTIONS[name], codecs, tokens_first=tokens_first)


@EVERY_ORDER
@EVERY_CODEC
@pytest.mark.parametrize("name", PRODUCTS)
def test_two_products_read_codes_as_dense_numbers(name, codecs, tokens_first):
    compare(lambda q, k, v, mask: PRODUCTS[name](q @ k.mT, mask) @ v, codecs, tokens_first=tokens_first)


def repeated_along(dim, x):
    """Heads repeated in the other order of dimensions, where they are `dim`."""
    return x.transpose(1, 2).repeat_interleave(2, dim).transpose(1, 2)


GROUPED = {
    "repeated before they are transposed": lambda q, k, v, mask: sdpa(
        q, repeated_along(2, k), repeated_along(2, v), mask
    ),
    "enable_gqa": lambda q, k, v, mask: sdpa(q, k, v, enable_gqa=True),
    "enable_gqa, mask and scale": lambda q, k, v, mask: sdpa(q, k, v, mask, scale=0.6, enable_gqa=True),
    "enable_gqa, causal": lambda q, k, v, mask: sdpa(q, k, v, is_causal=True, enable_gqa=True),
    "repeated": lambda q, k, v, mask: sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask),
    "tiled": lambda q, k, v, mask: sdpa(q, k.repeat(1, 2, 1, 1), v.repeat((1, 2, 1, 1)), mask),
    "halves tiled": lambda q, k, v, mask: sum(
        sdpa(q, k.repeat_interleave(2, 1), half.repeat(1, 2, 1, 1).repeat_interleave(2, 1), mask)
        for half in v.chunk(2, 1)
    ),
    "halves tiled in products": lambda q, k, v, mask: torch.cat(
        [(q[:, :4] @ k.mT).softmax(-1) @ half.repeat(1, 2, 1, 1) for half in v.chunk(2, 1)], 1
    ),
    "tokens twice": lambda q, k, v, mask: sdpa(
        q[:, :4], k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), mask[:, :4].repeat(1, 1, 1, 2)
    ),
    "expanded": lambda q, k, v, mask: sdpa(
        q, *(x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
    ),
    "products": lambda q, k, v, mask: (q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v.repeat_interleave(2, 1),
}


@EVERY_ORDER
@EVERY_CODEC
@pytest.mark.parametrize("name", GROUPED)
def test_a_query_head_reads_the_keys_of_its_group(name, codecs, tokens_first):
    compare(GROUPED[name], codecs, heads=8, tokens_first=tokens_first)


BROADCAST = {
    "one query head": lambda q, k, v, mask: sdpa(q[:, :1], k, v),
    "one query head in products": lambda q, k, v, mask: (q[:, :1] @ k.mT).softmax(-1) @ v,
    "one row of queries": lambda q, k, v, mask: sdpa(q[:1], k, v),
}

ONE_HEAD = {
    "in attention": lambda q, k, v, mask: sdpa(q, k[:, :1], v[:, :1], mask),
    "in products": lambda q, k, v, mask: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
    "selected": lambda q, k, v, mask: sdpa(q, k[:, 1].unsqueeze(1), v[:, 1].unsqueeze(1), mask),
    "selected and expanded": lambda q, k, v, mask: sdpa(q, *(x[:, 1, None].expand(-1, 4, -1, -1) for x in (k, v))),
}

FOLDED = {
    "in bmm": lambda q, k, v, mask: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ).unflatten(0, (2, 4)),
    "in baddbmm": lambda q, k, v, mask: (
        torch.baddbmm(bias(mask).flatten(0, 1), q.flatten(0, 1), k.reshape(-1, *k.shape[2:]).mT, beta=0.5, alpha=0.25)
        .softmax(-1)
        .bmm(v.reshape(-1, *v.shape[2:]))
        .view(2, 4, 3, -1)
    ),
    "in attention": lambda q, k, v, mask: sdpa(*(x.flatten(0, 1) for x in (q, k, v, mask))).unflatten(0, (2, 4)),
    "in attention, a mask for all": lambda q, k, v, mask: sdpa(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask[0, 0]
    ).unflatten(0, (2, 4)),
    "with heads repeated": lambda q, k, v, mask: sdpa(
        *(x.flatten(0, 1) for x in (q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1)))
    ).unflatten(0, (2, 4)),
    "in einsum, groups apart": lambda q, k, v, mask: torch.einsum(
        "bgrqk,bgkd->bgrqd",
        torch.einsum("bgrqd,bgkd->bgrqk", q.unflatten(1, (2, 2)), k[:, :2]).softmax(-1),
        v[:, :2],
    ).flatten(1, 2),
    "in einsum, heads last": lambda q, k, v, mask: torch.einsum(
        "bhqk,bkhd->bqhd",
        torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)).softmax(-1),
        v.transpose(1, 2),
    ).transpose(1, 2),
    "in einsum, a query of one token": lambda q, k, v, mask: torch.einsum(
        "bhk,bhkd->bhd", torch.einsum("bhd,bhkd->bhk", q[:, :, -1], k).softmax(-1), v
    ).unsqueeze(2),
    "in einsum, three shared letters": lambda q, k, v, mask: torch.einsum(
        "bghqk,bghkd->bghqd",
        torch.einsum("bghqd,bghkd->bghqk", q.unflatten(1, (2, 2)), k[:, :2, None].expand(-1, -1, 2, -1, -1)).softmax(
            -1
        ),
        v[:, :2, None].expand(-1, -1, 2, -1, -1),
    ).flatten(1, 2),
    "in matmul, groups apart": lambda q, k, v, mask: (
        (q.unflatten(1, (2, 2)) @ k[:, :2, None].mT).softmax(-1) @ v[:, :2, None]
    ).flatten(1, 2),
    "repeated by repeat": lambda q, k, v, mask: sdpa(
        q, *(x[:, :2].unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2) for x in (k, v))
    ),
}


@EVERY_CODEC
@pytest.mark.parametrize("tokens_first", [False, True], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("name", [*ONE_HEAD, *(f"folded {name}" for name in FOLDED)])
def test_heads_that_are_one_or_are_folded_are_read_as_codes(name, codecs, tokens_first):
    read = ONE_HEAD[name] if name in ONE_HEAD else FOLDED[name.removeprefix("folded ")]
    compare(read, codecs, tokens_first=tokens_first)


@pytest.mark.parametrize("name", BROADCAST)
def test_heads_and_rows_that_broadcast_are_no_groups_of_heads(name):
    compare(lambda *given: BROADCAST[name](*given) + sdpa(*given[:3]), LOSSLESS, decoded=True)


def test_keys_and_values_of_different_heads_are_two_products_or_decoded():
    """One head of keys and four of values, each right beside queries of four."""
    compare(lambda q, k, v, mask: (q @ k[:, :1].mT).softmax(-1) @ v, LOSSLESS)
    torch._dynamo.reset()
    compare(lambda q, k, v, mask: sdpa(q, k[:, :1].repeat_interleave(4, 1), v) + sdpa(q, k, v), LOSSLESS, decoded=True)


def test_queries_apart_in_front_of_the_heads_are_not_taken_for_groups_behind_them():
    def read(q, k, v, mask):
        apart = torch.stack([q, q * 2, q / 2], 1)
        return ((apart @ k[:, None].mT).softmax(-1) @ v[:, None]).sum(1) + sdpa(q, k, v)

    compare(read, LOSSLESS, decoded=True)


@pytest.mark.parametrize("rows", [[1, 0], [0, 0]], ids=str)
def test_rows_that_a_list_names_are_decoded(rows):
    """Not the one element of two dimensions that the tuple would name."""
    compare(lambda q, k, v, mask: sdpa(q, k[rows], v.flip(0), mask) + sdpa(q, k, v), LOSSLESS, decoded=True)
    torch._dynamo.reset()
    compare(lambda q, k, v, mask: sdpa(q, k, v[rows]) + sdpa(q, k, v), LOSSLESS, decoded=True)
