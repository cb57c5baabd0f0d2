"""Keys that are centred and kept as they are in part: scores of both kinds of tokens get the same centre back."""

import pytest
import torch
from checkpoints import assert_same, new_cache, prompt, step, tiny
from test_centred_models import BETWEEN, CALLS, EVERY_CACHE, assert_centred, conversation

EVERYTHING = {"keys": "turboquant:2", "values": "turboquant:2", "sinks": 2, "window": 60}
SOME = {"preset": "lossless", "sinks": 2, "window": 7}


def compiled(model, **options):
    return torch.compile(model, backend="turboquant", options={"inner": "eager", "centre": True, **options})


def assert_kept(cache, least):
    for layer in cache.layers:
        for side in (layer.keys, layer.values):
            assert (side.recent.index >= 0).sum() >= least


@EVERY_CACHE
@pytest.mark.parametrize("options", [EVERYTHING, SOME], ids=["all exact", "some exact"])
@pytest.mark.parametrize("name", ["llama", "qwen2, biases"])
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
    call, ours, dense = compiled(model, **EVERYTHING), new_cache(kind, model), new_cache(kind, model)
    mask, done = torch.ones(3, sum(CALLS), dtype=torch.int64), 0
    mask[1, :2], mask[2, :7] = 0, 0
    for ids in conversation(3):
        done += ids.shape[1]
        mine, theirs = (step(each, ids, c, attention_mask=mask[:, :done]) for each, c in ((call, ours), (model, dense)))
        real = mask[:, done - ids.shape[1] : done] == 1
        assert_same(mine[real], theirs[real])


@pytest.mark.parametrize("name", ["crop", "beam reorder"])
def test_eager_code_in_between(name):
    model = tiny()
    call, ours, dense = compiled(model, **EVERYTHING), new_cache("dynamic", model), new_cache("dynamic", model)
    first, *others = conversation()
    for ids in (first, *others[:1]):
        step(call, ids, ours), step(model, ids, dense)
    BETWEEN[name](ours), BETWEEN[name](dense)
    for ids in others:
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert_kept(ours, 20)


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
