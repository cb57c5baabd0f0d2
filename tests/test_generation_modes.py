"""What else people ask of `generate` and of a compiled model, beside tests/test_generate.py and tests/test_continue.py.

With the lossless codec every token and logit must be what the untouched model says.
"""

import copy

import pytest
import torch
from checkpoints import assert_compressed, assert_same, cache_of, new_cache, prompt, step, tensors, tiny
from conversations import fake_quantised
from test_generate import LOSSLESS, asked_for, assert_says_the_same, compile_forward, say
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tqcompile
from tqcompile import CompressedKV

BOTH = pytest.mark.parametrize("kind", ["dynamic", "static"])
Q8 = {"preset": "quality", "inner": "eager"}


def compiled(model, **options):
    return torch.compile(model, backend="turboquant", options={**LOSSLESS, **options})


def assert_goes_alike(model, calls, kind="dynamic", rows=2, twin=None):
    """Calls (tokens, what else is given) of a compiled model say what those of the untouched one do; its cache."""
    twin = twin or copy.deepcopy(model)
    call, ours, dense = compiled(model), new_cache(kind, model), new_cache(kind, model)
    for seed, (tokens, given) in enumerate(calls):
        ids = prompt(rows, tokens, seed)
        assert_same(step(call, ids, ours, **given), step(twin, ids, dense, **given))
    return ours


@BOTH
def test_a_prompt_that_is_read_in_chunks(kind):
    model, ids, chunks = tiny(), prompt(2, 10), {"prefill_chunk_size": 4}
    static = {"cache_implementation": "static"} if kind == "static" else {}
    dense = say(model, ids, **static, **chunks, **({"disable_compile": True} if static else {}))
    asked = asked_for(mode=None, backend=tqcompile.turboquant(**LOSSLESS)) if static else {}
    ours = say(model if static else compile_forward(model), ids, **asked, **chunks)
    assert_says_the_same(ours, dense)
    assert_compressed(cache_of(ours), model)


def test_a_static_cache_is_used_again_by_generate():
    model = tiny()
    twin, cache = copy.deepcopy(model), new_cache("static", compile_forward(model))
    for seed in range(3):
        dense = say(twin, prompt(2, 6, seed), tokens=4)
        cache.reset()
        ours = say(model, prompt(2, 6, seed), tokens=4, past_key_values=cache)
        assert torch.equal(ours.sequences, dense.sequences)
        assert_compressed(cache, model)


@BOTH
def test_right_padding(kind):
    """The answers go behind the padding, which nobody sees."""
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:], mask[1, 3:] = 0, 0
    calls = [(1, {"attention_mask": mask}) for _ in range(3)]
    model = tiny()
    twin, call, caches = copy.deepcopy(model), compiled(model), (new_cache(kind, model), new_cache(kind, model))
    ours, dense = (step(c, prompt(3, 8), cache, attention_mask=mask) for c, cache in zip((call, twin), caches))
    assert_same(ours[mask.bool()], dense[mask.bool()])
    for seed in range(len(calls)):
        mask = F.pad(mask, (0, 1), value=1)
        given = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
        ours, dense = (step(c, prompt(3, 1, seed), cache, **given) for c, cache in zip((call, twin), caches))
        assert_same(ours, dense)
    assert_compressed(caches[0], model)


@BOTH
def test_positions_with_gaps(kind):
    places = ([0, 1, 4, 5, 9], [12], [20], [33, 35])
    model = tiny()
    ours = assert_goes_alike(model, [(len(p), {"position_ids": torch.tensor([p, p])}) for p in places], kind)
    assert_compressed(ours, model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@BOTH
def test_packed_sequences_see_their_own_tokens_only(kind, attention):
    documents, places = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    blocks = (documents[:, None] == documents) & torch.ones(10, 10, dtype=torch.bool).tril()
    calls = []
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 10)):
        mask = F.pad(blocks[None, None, start:stop, :stop], (0, 40 - stop if kind == "static" else 0))
        mask = mask if attention == "sdpa" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        calls.append((stop - start, {"attention_mask": mask, "position_ids": places[:, start:stop]}))
    model = tiny("llama", attention)
    assert_compressed(assert_goes_alike(model, calls, kind, rows=1), model)


def test_packed_sequences_that_only_positions_tell_apart():
    model, places = tiny(), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    assert_compressed(assert_goes_alike(model, [(10, {"position_ids": places})], rows=1), model)


@BOTH
def test_autocast(kind):
    """Products are rounded to bfloat16, 2**-8 of a number, in another order."""
    model = tiny()
    call, twin, ours, dense = compiled(model), copy.deepcopy(model), new_cache(kind, model), new_cache(kind, model)
    for seed, tokens in enumerate((5, 1, 1, 3)):
        with torch.autocast("cpu", torch.bfloat16):
            mine, theirs = (step(c, prompt(2, tokens, seed), cache) for c, cache in ((call, ours), (twin, dense)))
        assert mine.dtype == theirs.dtype == torch.bfloat16
        assert (mine - theirs).abs().max() < 0.03 * theirs.abs().max()
    assert_compressed(ours, model)


class Adapter(nn.Module):
    """A linear layer that is kept, and what was learned beside it."""

    def __init__(self, inner: nn.Linear, rank: int = 4):
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, rank, bias=False).requires_grad_(False)
        self.up = nn.Linear(rank, inner.out_features, bias=False).requires_grad_(False)

    def forward(self, x):
        return self.inner(x) + 0.5 * self.up(self.down(x))


def adapted(model):
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)))
    return model


@BOTH
def test_adapters_around_projections(kind):
    model = adapted(tiny())
    assert_compressed(assert_goes_alike(model, [(5, {}), (1, {}), (1, {}), (3, {})], kind), model)


class Int8(nn.Module):
    """Weights of one byte, with a scale a row."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        scales = inner.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("codes", (inner.weight / scales).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.codes * self.scales)


def test_weights_that_are_codes_themselves():
    model = tiny()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8(getattr(layer.self_attn, name)))
    assert_compressed(assert_goes_alike(model, [(5, {}), (1, {}), (3, {})]), model)


def broken_at(model, name: str):
    for layer in model.model.layers:
        getattr(layer.self_attn, name).register_forward_hook(lambda *given: torch._dynamo.graph_break())
    return model


@pytest.mark.parametrize("name", ["k_proj", "o_proj"])
@BOTH
def test_a_graph_break_inside_each_layer(kind, name):
    """Whatever Dynamo compiles of the pieces, the numbers are right, caches are codes, and the report says why."""
    model = tiny()
    ours = assert_goes_alike(broken_at(model, name), [(5, {}), (1, {}), (1, {}), (3, {})], kind, twin=tiny())
    assert all(isinstance(tensor, CompressedKV) for tensor in tensors(ours))
    said = str(tqcompile.report(model))
    assert "ended early by Dynamo" in said and "graph_break()" in said


def test_code_that_dynamo_gives_up_on_is_said_to_decode():
    model = tiny()
    call, cache = compiled(model), new_cache("dynamic", model)
    step(call, prompt(2, 5), cache), step(call, prompt(2, 1), cache)
    assert "not compiled" not in str(tqcompile.report(model))
    step(model, prompt(2, 1), cache)
    assert "decoded for code that was not compiled:" in str(tqcompile.report(model))
    assert sum(sum(graph.eager.values()) for graph in tqcompile.report(model).graphs) >= 4


class Apart(nn.Module):
    """A past that grows in one graph and is read in the next."""

    def __init__(self, between=torch._dynamo.graph_break):
        super().__init__()
        self.between, self.mix = between, nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x, past):
        keys, values = (torch.cat([old, new], 2) for old, new in zip(past, (self.mix(x), x)))
        self.between()
        return F.scaled_dot_product_attention(x, keys, values), (keys, values)


def test_a_past_that_the_next_graph_reads_is_dense_and_the_report_says_why():
    model, past = Apart(), (torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    call = compiled(model, strict=True)
    for _ in range(3):
        _, past = call(torch.randn(1, 2, 1, 16), past)
    report = tqcompile.report(model)
    assert {type(each) for each in past} == {torch.Tensor}
    reasons = {refusal.reason for refusal in tqcompile.report().refusals}
    assert reasons == {"attention reads it, and no graph that was compiled keeps tokens in it"}
    assert "ended early by Dynamo" in str(report)
    del past
    assert not tqcompile.report().refusals


class Codes(nn.Module):
    """A cache that the model itself keeps as signed bytes."""

    def __init__(self):
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 2, 16, 8, dtype=torch.int8))

    def forward(self, x, positions):
        for cache in (self.keys, self.values):
            cache[:, :, positions] = (x * 100).round().to(torch.int8)
        mask = torch.arange(16) <= positions[:, None]
        return F.scaled_dot_product_attention(x, self.keys / 100, self.values / 100, mask)


def test_a_models_own_codes_are_left_alone_and_the_report_says_so():
    model = Codes()
    compiled(model)(torch.rand(1, 2, 1, 8), torch.tensor([0]))
    refused = {refusal.name: refusal.reason for refusal in tqcompile.report(model).refusals}
    assert len(refused) == 2 and set(refused.values()) == {"its dtype is torch.int8"}


@pytest.mark.parametrize("options", [LOSSLESS, Q8])
def test_what_a_cache_becomes_in_eager_code_is_what_the_report_counts(options):
    model = tiny()
    call, cache = torch.compile(model, backend="turboquant", options=options), new_cache("dynamic", model)
    for tokens in (5, 1, 1):
        step(call, prompt(2, tokens), cache)
    for change in (
        lambda: cache.crop(-3),
        lambda: step(model, prompt(2, 1), cache),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        change()
        report = tqcompile.report(model)
        assert {id(each) for each in report.caches} == {id(each) for each in tensors(cache)}
        assert report.dense_bytes == sum(each.numel() * 4 for each in tensors(cache))
    view = tensors(cache)[0][:, :, :1]
    assert report.dense_bytes == sum(each.numel() * 4 for each in tensors(cache)) and view.shape[2] == 1


class Shown(nn.Module):
    """A cache that is returned turned around, beside what attention made of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 2, 16, 8)), self.register_buffer("values", torch.zeros(1, 2, 16, 8))

    def forward(self, x, positions):
        self.keys[:, :, positions], self.values[:, :, positions] = x, x
        return F.scaled_dot_product_attention(x, self.keys, self.values), self.keys.mT


def test_a_graph_returns_a_view_that_codes_cannot_be_seen_through():
    model = Shown()
    call = compiled(model)
    for place in range(3):
        _, turned = call(torch.rand(1, 2, 1, 8), torch.tensor([place]))
        assert isinstance(model.keys, CompressedKV) and torch.equal(turned, model.keys.decode().mT)


# ---- flex_attention ----


@BOTH
def test_flex_attention(kind):
    model, ids = tiny("llama", "flex_attention"), prompt(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    static = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    # Run eagerly it would have Inductor compile it, whose C++ for this mask does not compile.
    dense = say(tiny(), ids, 4, attention_mask=mask, **static)
    ours = say(compile_forward(model), ids, 4, attention_mask=mask, **static)
    assert_says_the_same(ours, dense)
    assert_compressed(cache_of(ours), model)
    assert tqcompile.report(model).graphs[-1].kinds == {"attend": 2} or kind == "dynamic"


class Flex(nn.Module):
    """Attention over buffers that the user wrote with flex_attention."""

    def __init__(self, score_mod=None):
        super().__init__()
        self.score_mod = score_mod
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, 2, 128, 16))

    def forward(self, q, k, v, positions, mask):
        self.keys[:, :, positions], self.values[:, :, positions] = k, v
        return flex_attention(q, self.keys, self.values, score_mod=self.score_mod, block_mask=mask, enable_gqa=True)


def flex_calls():
    """Two calls, of which the second sees a window and its own head's part of it."""
    for start, tokens in ((0, 5), (5, 1)):

        def seen(batch, head, query, token, start=start):
            return (token <= query + start) & (token + 3 > query + start - head)

        mask = create_block_mask(seen, 2, 4, tokens, 128, device="cpu")
        q, k, v = torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)
        yield q, k, v, torch.arange(start, start + tokens), mask


@pytest.mark.parametrize("codec", ["identity", "q8_0"])
def test_flex_attention_over_codes_hides_what_its_mask_hides(codec):
    model, twin = Flex(), Flex()
    call = compiled(model, keys=codec, values=codec)
    for q, k, v, positions, mask in flex_calls():
        ours = call(q, k, v, positions, mask)
        assert_same(ours, twin(q, fake_quantised(k, codec), fake_quantised(v, codec), positions, mask))
    report = tqcompile.report(model)
    assert isinstance(model.keys, CompressedKV) and not report.refusals and not report.fallbacks
    assert report.graphs[-1].kinds == {"attend": 1}


def test_flex_attention_that_scales_the_scores_of_a_head_reads_a_decoded_cache_and_is_reported():
    model = Flex(lambda score, batch, head, query, token: score * (head + 1))
    twin, call = copy.deepcopy(model), compiled(model)
    for given in flex_calls():
        assert_same(call(*given), twin(*given))
    report = tqcompile.report(model)
    assert isinstance(model.keys, CompressedKV) and not report.graphs[-1].reads
    assert {fallback.operator for fallback in report.fallbacks} == {"flex_attention"}
    assert all(__file__ in fallback.where for fallback in report.fallbacks)


def test_flex_attention_over_its_own_tokens_stays_flex_attention(tmp_path):
    model = tiny("llama", "flex_attention")
    call = compiled(model, dump=tmp_path)
    step(call, prompt(2, 6), new_cache("dynamic", model))
    after = [path.read_text() for path in tmp_path.glob("*.after.py")]
    assert any("flex_attention" in text for text in after)
    assert not any("scaled_dot_product_attention" in text for text in after)
