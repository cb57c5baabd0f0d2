"""Where there is no cache to compress, a model gets exactly what plain Inductor gives it."""

import warnings

import pytest
import torch
from models import EMBED, Shape, Tuples
from torch import nn

import tqcompile


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x)


class Vision(nn.Module):
    """A patch embedding, self-attention whose output stays [B, H, T, D], and a convolution."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 96)
        self.convolution, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 + 32, 5)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).mT
        q, k, v = self.qkv(tokens).view(*tokens.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        pooled = torch.cat([self.convolution(x).mean((2, 3)), mixed.transpose(1, 2).flatten(2).mean(1)], -1)
        return self.head(pooled), mixed


class Decoder(nn.Module):
    """Causal attention without a cache."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), (2, 6, 32)),
    "encoder": (Encoder, (2, 6, 32)),
    "vision": (Vision, (2, 3, 16, 16)),
    "decoder": (Decoder, (2, 6, 32)),
}


def run(model, x, backend, train):
    """Outputs and gradients of the compiled model, and the warnings on the way."""
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.set_grad_enabled(train):
            out = torch.compile(model, backend=backend)(x)
        flat = out if isinstance(out, tuple) else (out,)
        if train:
            sum(part.square().mean() for part in flat).backward()
    gradients = [parameter.grad for parameter in model.parameters()] if train else []
    model.zero_grad()
    return [*flat, *gradients], [str(warning.message) for warning in caught]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_a_cache_is_bit_for_bit_what_inductor_makes(name, train):
    make, shape = MODELS[name]
    model, x = make().train(train), torch.randn(shape)
    # Plain Inductor first: what PyTorch warns of once in a process is not ours.
    plain, plain_warnings = run(model, x, "inductor", train)
    ours, our_warnings = run(model, x, "turboquant", train)
    assert all(map(torch.equal, ours, plain))
    assert our_warnings == [] or our_warnings == plain_warnings
    report = tqcompile.report(model)
    assert report.graphs and not any(graph.sites or graph.reads for graph in report.graphs) and not report.refusals


def test_training_a_model_that_returns_its_cache_is_left_alone():
    model, x = Tuples(Shape()), torch.randn(2, 5, EMBED)
    results = []
    for backend in ("turboquant", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        out, past = compiled(x)
        longer, present = compiled(x, past)
        (out.square().sum() + longer.square().sum()).backward()
        results.append([out, longer, *(t for kv in present for t in kv), *(p.grad for p in model.parameters())])
        model.zero_grad()
    assert all(map(torch.equal, *results))
    assert not any(graph.sites for graph in tqcompile.report(model).graphs)


def test_gradients_flow_to_queries_that_read_a_cache():
    def step(past_k, past_v, q):
        return nn.functional.scaled_dot_product_attention(q, past_k, past_v)

    compiled = torch.compile(step, backend="turboquant", options={"preset": "lossless", "inner": "eager"})
    caches = [
        tqcompile.CompressedKV.encode(torch.randn(1, 2, 5, 32), tqcompile.formats.codec("identity")) for _ in "kv"
    ]
    q = torch.randn(1, 2, 3, 32, requires_grad=True)
    compiled(*caches, q).sum().backward()
    ours, q.grad = q.grad, None
    step(*(cache.decode() for cache in caches), q).sum().backward()
    torch.testing.assert_close(ours, q.grad)
