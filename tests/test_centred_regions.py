"""Keys that are centred and kept as they are in part: scores of both kinds of tokens get the same centre back."""

import pytest
import torch
from checkpoints import assert_same, new_cache, prompt, step, tiny
from representatives import every_pair
from test_centred_models import BETWEEN, CALLS, EVERY_CACHE, MODELS, assert_centred, changed, conversation, padded

EVERYTHING = {"keys": "turboquant:2", "values": "turboquant:2", "sinks": 2, "window": 60}
SOME = {"preset": "lossless", "sinks": 2, "window": 7}


def compiled(model, **options):
    return torch.compile(model, backend="turboquant", options={"inner": "eager", "centre": True, **options})


def assert_kept(cache, least):
    for layer in cache.layers:
        for side in (layer.keys, layer.values):
            assert (side.recent.index >= 0).sum() >= least


@pytest.mark.parametrize("name, options, kind", every_pair(MODELS, (EVERYTHING, SOME), ("dynamic", "static")))
def test_what_is_kept_is_less_the_centre_that_scores_get_back(name, options, kind):
    model = tiny(name)
    call, ours, dense = compiled(model, **options), new_cache(kind, model), new_cache(kind, model)
    for ids in conversation():
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert_centred(ours, model)
    assert_kept(ours, min(sum(CALLS), options["sinks"] + options["window"]))


@EVERY_CACHE
def test_rows_that_are_padded_on_the_left(kind):
    model = tiny()
    assert_kept(padded(compiled(model, **EVERYTHING), model, kind), sum(CALLS))


@pytest.mark.parametrize("name", ["crop", "beam reorder"])
def test_eager_code_in_between(name):
    model = tiny()
    assert_kept(changed(BETWEEN[name], compiled(model, **EVERYTHING), model), 20)


def test_a_cache_that_was_made_without_a_centre_is_read_by_a_graph_that_centres():
    """Codes are encoded once more, and what was kept of other numbers is forgotten."""
    model = tiny()
    plain = torch.compile(model, backend="turboquant", options={"inner": "eager", "preset": "lossless", "window": 60})
    call = compiled(model, **SOME | {"sinks": 0, "window": 60})
    ours, dense = (new_cache("static", model) for _ in range(2))
    ids = prompt(2, 20)
    step(plain, ids, ours), step(model, ids, dense)
    for ids in conversation()[1:]:
        assert_same(step(call, ids, ours), step(model, ids, dense))


def made_beforehand(model, rows=2):
    """A static cache whose tensors are there before any graph is."""
    cache, layer = new_cache("static", model), model.model.layers[0].self_attn
    cache.early_initialization(rows, model.config.num_key_value_heads, layer.head_dim, torch.float32, "cpu")
    return cache


@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_a_cache_that_was_made_beforehand_learns_and_keeps_of_its_prompt(first):
    """Its sinks come in the call that learns the mean, and only then."""
    model = tiny()
    call, ours, dense = compiled(model, **SOME), made_beforehand(model), made_beforehand(model)
    prompt, *others = conversation()
    assert_same(step(call if first == "compiled" else model, prompt, ours), step(model, prompt, dense))
    if first == "compiled":
        assert_kept(ours, SOME["sinks"] + SOME["window"])
    for ids in others:
        assert_same(step(call, ids, ours), step(model, ids, dense))
        assert_kept(ours, SOME["sinks"] + SOME["window"])
    assert_centred(ours, model)
    for mine, theirs in zip(ours.layers, dense.layers):
        assert set(range(SOME["sinks"])) < set(mine.keys.recent.index.tolist())
        torch.testing.assert_close(mine.keys.decode(), theirs.keys, atol=1e-5, rtol=1e-5)
