"""Models whose keys are centred say what they say without: the mean that is taken off comes back as scores."""

import pytest
import torch
from checkpoints import assert_compressed, assert_same, new_cache, prompt, step, tiny
from representatives import every_pair

from tqcompile import report

CALLS = (20, 1, 1, 3, 1)
MODELS = ("llama", "qwen2, biases")
OPTIONS = {"preset": "lossless", "inner": "eager", "centre": True}

EVERY_CACHE = pytest.mark.parametrize("kind", ["dynamic", "static"])


def compiled(model, **options):
    return torch.compile(model, backend="turboquant", options=OPTIONS | options)


def conversation(rows=2, seed=50):
    return [prompt(rows, tokens, seed + index) for index, tokens in enumerate(CALLS)]


def padded(call, model, kind):
    """The cache of `call` after a conversation whose rows are padded on the left, equal to the eager model's."""
    ours, dense = new_cache(kind, model), new_cache(kind, model)
    mask, done = torch.ones(3, sum(CALLS), dtype=torch.int64), 0
    mask[1, :2], mask[2, :7] = 0, 0
    for ids in conversation(3):
        done += ids.shape[1]
        mine, theirs = (step(each, ids, c, attention_mask=mask[:, :done]) for each, c in ((call, ours), (model, dense)))
        real = mask[:, done - ids.shape[1] : done] == 1
        assert_same(mine[real], theirs[real])
    return ours


def changed(between, call, model):
    """The cache of `call` after a conversation in which eager code changes it, equal to the eager model's."""
    ours, dense = new_cache("dynamic", model), new_cache("dynamic", model)
    first, *others = conversation()
    for ids in (first, *others[:1]):
        step(call, ids, ours), step(model, ids, dense)
    between(ours), between(dense)
    for ids in others:
        assert_same(step(call, ids, ours), step(model, ids, dense))
    return ours


def assert_centred(cache, model):
    """All keys are, by a rotation and a mean of their own, and nothing went wrong."""
    assert_compressed(cache, model)
    centres = [layer.keys.centre for layer in cache.layers]
    assert all(centre.rotation.turns and centre.mean.norm() > 0.1 for centre in centres)
    assert not any(graph.uncentred for graph in report(model).graphs)
    assert "keys balanced, and less a mean that positions turn in" in str(report(model))


@pytest.mark.parametrize("name, attention, kind", every_pair(MODELS, ("sdpa", "eager"), ("dynamic", "static")))
def test_identity_equals_the_eager_model(name, attention, kind):
    model = tiny(name, attention)
    call, ours, dense = compiled(model), new_cache(kind, model), new_cache(kind, model)
    for ids in conversation():
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert_centred(ours, model)
    for mine, theirs in zip(ours.layers, dense.layers):
        torch.testing.assert_close(mine.keys.decode(), theirs.keys, atol=1e-5, rtol=1e-5)


@EVERY_CACHE
def test_rows_that_are_padded_on_the_left_equal_the_eager_model(kind):
    model = tiny()
    assert_centred(padded(compiled(model), model, kind), model)


BETWEEN = {
    "crop": lambda cache: cache.crop(-6),
    "beam reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "some sequences": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_cache_that_eager_code_changed_goes_on_as_the_dense_one(name):
    model = tiny()
    assert_centred(changed(BETWEEN[name], compiled(model), model), model)


def test_a_static_cache_that_was_reset_starts_another_chat():
    model = tiny()
    call, ours, dense = compiled(model), new_cache("static", model), new_cache("static", model)
    for seed in (50, 60):
        for ids in conversation(seed=seed)[:3]:
            assert_same(step(call, ids, ours), step(model, ids, dense))
        ours.reset(), dense.reset()


@EVERY_CACHE
def test_a_dense_prompt_is_centred_when_it_is_compressed(kind):
    model = tiny()
    call, ours, dense = compiled(model), new_cache(kind, model), new_cache(kind, model)
    first, *others = conversation()
    step(model, first, ours), step(model, first, dense)
    for ids in others:
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert_centred(ours, model)


def test_a_short_prompt_is_centred_by_the_biases_of_the_model():
    model = tiny("qwen2, biases")
    call, ours = compiled(model), new_cache("dynamic", model)
    for tokens in (3, 1):
        step(call, prompt(2, tokens), ours)
    biases = [layer.self_attn.k_proj.bias.view(2, -1) for layer in model.model.layers]
    for layer, bias in zip(ours.layers, biases):
        torch.testing.assert_close(layer.keys.centre.mean[:, :, 0], bias.half().float().expand(2, -1, -1))


def test_channels_that_queries_weigh_more_are_kept_more_exactly():
    """|q b| and |k / b| share out what one of them gains: a tenfold query takes half of that on a logarithmic scale."""
    balances, first = [], conversation()[0]
    for factor in (1, 10):
        torch._dynamo.reset()
        model = tiny()
        attention = model.model.layers[0].self_attn
        with torch.no_grad():
            attention.q_proj.weight.view(-1, attention.head_dim, attention.q_proj.in_features)[
                :, [1, 1 + attention.head_dim // 2]
            ] *= factor
        cache = new_cache("dynamic", model)
        step(compiled(model), first, cache)
        balances.append(cache.layers[0].keys.centre.balance)
    once, tenfold = (balance / balance[..., :1] for balance in balances)
    assert balances[0].max() < 7 and balances[0].min() > 1 / 7, "within its bounds, which would hide the factor"
    torch.testing.assert_close(
        once[..., 1] / tenfold[..., 1], torch.full_like(once[..., 1], 10**0.5), atol=0, rtol=3e-3
    )
    torch.testing.assert_close(once[..., 2:5], tenfold[..., 2:5], atol=0, rtol=3e-3)


def test_beams_are_those_of_the_eager_model():
    model = tiny()
    ids, options = prompt(2, 20), {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    model.forward = compiled(model.forward)
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_graph_that_does_not_centre_reads_a_centred_cache_aright():
    model = tiny()
    ours, dense = new_cache("dynamic", model), new_cache("dynamic", model)
    calls = (compiled(model), compiled(model), compiled(model, centre=False), compiled(model))
    for call, ids in zip(calls, conversation()):
        assert_same(step(call, ids, ours), step(model, ids, dense))


def test_keys_with_large_biases_are_worth_their_codes_again():
    model = tiny("qwen2, biases")
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.mul_(100)
    first, *others = conversation()
    errors = []
    for centre in (False, True):
        torch._dynamo.reset()
        call = compiled(model, keys="turboquant:4", centre=centre)
        ours, dense = new_cache("dynamic", model), new_cache("dynamic", model)
        said = [(step(call, ids, ours), step(model, ids, dense)) for ids in (first, *others)]
        errors.append(sum((mine - theirs).norm() for mine, theirs in said[1:]))
    assert errors[1] < 0.5 * errors[0]
