"""Programs that random ones were shrunk to: each gave something else than the eager model once."""

import pytest
import torch
from torch.nn import functional as F

from tqcompile import CompressedKV

HEADS, HEAD_DIM, LENGTH = 2, 8, 8


def compiled(step, **options):
    torch._dynamo.reset()
    return torch.compile(step, backend="turboquant", options={"preset": "lossless", "inner": "eager", **options})


def numbers(tensor):
    return tensor.decode() if isinstance(tensor, CompressedKV) else tensor + 0


def caches(tokens=LENGTH):
    return torch.zeros(1, HEADS, tokens, HEAD_DIM), torch.zeros(1, HEADS, tokens, HEAD_DIM)


@torch.no_grad()
def test_tokens_of_another_dtype_are_cast_as_autocast_casts_them():
    weight = torch.randn(HEAD_DIM, HEAD_DIM)

    def step(x, keys, values, at):
        keys, values = keys.index_copy(2, at, x @ weight), values.index_copy(2, at, x @ weight)
        # Nothing attends to these keys: they stay dense, and the values do not.
        return F.scaled_dot_product_attention(x, values, values) + keys.amax(), keys, values

    call, ours, dense = compiled(step), caches(), caches()
    with torch.autocast("cpu", torch.bfloat16):
        for at in range(3):
            x = torch.randn(1, HEADS, 1, HEAD_DIM)
            out, *ours = call(x, *ours, torch.tensor([at]))
            expected, *dense = step(x, *dense, torch.tensor([at]))
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
            assert all(torch.equal(numbers(a), b) for a, b in zip(ours, dense))
    assert [type(cache) for cache in ours] == [torch.Tensor, CompressedKV]


@torch.no_grad()
@pytest.mark.parametrize("additive", [False, True])
def test_a_past_of_no_tokens_may_be_read_behind_a_mask(additive):
    def step(x, keys, values):
        seen = torch.arange(keys.shape[2]) <= torch.arange(x.shape[2])[:, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if additive else seen
        before = F.scaled_dot_product_attention(x, keys, values, attn_mask=mask)
        keys, values = torch.cat([keys, x], 2), torch.cat([values, x], 2)
        return before + F.scaled_dot_product_attention(x, keys, values), keys, values

    call, ours, dense = compiled(step), caches(3), caches(3)
    for call_of in (1, 2, 1):
        x = torch.randn(1, HEADS, call_of, HEAD_DIM)
        out, *ours = call(x, *ours)
        expected, *dense = step(x, *dense)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        ours, dense = [c[:, :, :0] for c in ours], [c[:, :, :0] for c in dense]
    assert isinstance(ours[0], CompressedKV)


@torch.no_grad()
def test_views_that_leave_a_graph_of_a_decoded_copy_show_the_cache():
    def step(x, keys, values, at):
        keys.narrow(2, at, 1).copy_(x)
        values.narrow(2, at, 1).copy_(x)
        return F.scaled_dot_product_attention(x, keys, values), keys[:, :, :2], keys.view(-1)

    def unknown(x, keys, values, at):
        keys.narrow(2, at, 1).zero_().add_(x)
        return F.scaled_dot_product_attention(x, keys, values), keys.transpose(1, 2)[:, :2], keys.view(-1)

    keys, values = caches()
    for at, function in enumerate((step, unknown)):
        _, tokens, flat = compiled(function)(torch.randn(1, HEADS, 1, HEAD_DIM), keys, values, at)
        assert isinstance(keys, CompressedKV) and torch.equal(numbers(flat), numbers(keys).flatten())
        with pytest.raises(RuntimeError, match="would not see it"):
            flat.zero_()
        tokens[:, :, 0].zero_()
        assert not numbers(keys)[:, 0, 0].any()
