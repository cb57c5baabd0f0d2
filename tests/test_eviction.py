"""Caches that tokens are taken out of by what attention made of them: as codes, each token as it was first encoded."""

import pytest
import torch
from conversations import fake_quantised

import tqcompile

KEPT, HEADS, HEAD_DIM = 6, 3, 16
CODECS = ("identity", "q8_0", "turboquant:3")

CHOICES = {
    "gather": lambda x, places: x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[-1])),
    "gather by keywords": lambda x, places: torch.gather(
        x, dim=-2, index=places.unsqueeze(-1).repeat(1, 1, 1, HEAD_DIM)
    ),
    "take_along_dim": lambda x, places: torch.take_along_dim(x, places[..., None], dim=2),
    "take_along_dim for all heads": lambda x, places: x.take_along_dim(places[:, :1, :, None], 2),
    "index_select": lambda x, places: x.index_select(2, places[0, 0]),
    "an index": lambda x, places: x[:, :, places[0, 0]],
    "some, and the last ones": lambda x, places: torch.cat(
        [x.gather(2, places[..., :3, None].expand(-1, -1, -1, x.shape[-1])), x[:, :, -3:]], 2
    ),
}


class Evicting(torch.nn.Module):
    """One layer that keeps the tokens with the largest sums of weights; `stored` is what its cache makes of tokens."""

    def __init__(self, choose, stored=lambda x: x):
        super().__init__()
        self.choose, self.stored = choose, stored
        self.project = torch.nn.Linear(8, 3 * HEADS * HEAD_DIM)

    def forward(self, x, past):
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind()
        if past is not None:
            k, v = torch.cat([past[0], self.stored(k)], 2), torch.cat([past[1], self.stored(v)], 2)
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).triu(k.shape[2] - q.shape[2] + 1)
        weights = (q @ k.mT / 4).masked_fill(hidden, float("-inf")).softmax(-1)
        out = weights @ v
        if past is None:
            k, v = self.stored(k), self.stored(v)
        if k.shape[2] > KEPT:
            places = weights.sum(2).topk(KEPT, -1).indices.sort(-1).values
            k, v = self.choose(k, places), self.choose(v, places)
        return out, (k, v)


def steps(call, lengths, device="cpu"):
    """The results of calls with so many tokens, and the caches behind each."""
    generator, past = torch.Generator().manual_seed(1), None
    for length in lengths:
        with torch.no_grad():
            out, past = call(torch.randn(2, length, 8, generator=generator).to(device), past)
        yield out, past


def pair(choose, codec, device="cpu"):
    torch.manual_seed(0)
    torch.compiler.reset()
    model, twin = Evicting(choose).to(device), Evicting(choose, lambda x: fake_quantised(x, codec)).to(device)
    twin.load_state_dict(model.state_dict())
    options = {"keys": codec, "values": codec, "inner": "eager"}
    return model, torch.compile(model, backend="turboquant", options=options), twin


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("lengths", [(9, 1, 1, 2), (4, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", CHOICES)
def test_what_is_left_is_what_was_encoded_first(name, codec, lengths, device):
    model, compiled, twin = pair(CHOICES[name], codec, device)
    for (out, caches), (expected, dense) in zip(steps(compiled, lengths, device), steps(twin, lengths, device)):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        for cache, plain in zip(caches, dense):
            assert isinstance(cache, tqcompile.CompressedKV) and cache.shape == plain.shape
            torch.testing.assert_close(cache.decode(), plain, rtol=1e-5, atol=1e-5)
    report = tqcompile.report(model)
    assert not report.refusals and not report.fallbacks, report


def by_channel(x, places):
    """Other tokens in each channel."""
    return x.gather(2, (places[..., None] + torch.arange(HEAD_DIM) % 2).clamp(max=x.shape[2] - 1))


def scaled(x, places):
    return x.gather(2, places[..., None].expand(-1, -1, -1, HEAD_DIM)) * 0.5


@pytest.mark.parametrize("lengths", [(9, 1, 1), (4, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize(("choose", "operator"), [(by_channel, "gather"), (scaled, "mul")])
def test_tokens_that_are_changed_before_they_are_kept_are_dense_and_listed(choose, operator, lengths):
    model, compiled, twin = pair(choose, "identity")
    for (out, caches), (expected, dense) in zip(steps(compiled, lengths), steps(twin, lengths)):
        torch.testing.assert_close(out, expected)
        for cache, plain in zip(caches, dense):
            torch.testing.assert_close(torch.Tensor.clone(cache), plain)
    assert not any(isinstance(cache, tqcompile.CompressedKV) for cache in caches)
    refusals = tqcompile.report(model).refusals
    assert {refusal.name for refusal in refusals} == {"L['past'][0]", "L['past'][1]"}
    assert all(refusal.reason.startswith(f"{operator} makes what is kept of it") for refusal in refusals)
    assert all(__file__ in refusal.where and f"in {choose.__name__}" in refusal.where for refusal in refusals)


def test_tokens_in_front_of_a_past_make_a_cache_anew():
    def step(q, k, v, past):
        k, v = torch.cat([k, past[0]], 2), torch.cat([v, past[1]], 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v), (k, v)

    compiled = torch.compile(step, backend=tqcompile.turboquant(preset="lossless", inner="eager", strict=True))
    past = dense = tuple(torch.randn(2, HEADS, 4, HEAD_DIM) for _ in range(2))
    with torch.no_grad():
        for _ in range(3):
            q, k, v = (torch.randn(2, HEADS, 1, HEAD_DIM) for _ in range(3))
            (out, past), (expected, dense) = compiled(q, k, v, past), step(q, k, v, dense)
            torch.testing.assert_close(out, expected)
    assert all(isinstance(cache, tqcompile.CompressedKV) for cache in past)
