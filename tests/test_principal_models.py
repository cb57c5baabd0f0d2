"""Models whose caches are kept in principal components say what they say without: queries and sums are turned alike."""

from dataclasses import replace

import pytest
import torch
from checkpoints import assert_compressed, assert_same, new_cache, prompt, step, tiny
from representatives import every_pair

from tqcompile import CompressedKV, formats, principal, report

from test_centred_models import BETWEEN, CALLS, EVERY_CACHE, changed, compiled, conversation, padded  # isort: skip

EXACT = "exact in a basis"
PAIRS = {"keys": (EXACT, "identity"), "values": ("identity", EXACT), "both": (EXACT, EXACT)}
MODELS = ("llama", "qwen2, biases")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """A codec that keeps components themselves: what it loses is what turning loses."""
    monkeypatch.setitem(formats.REGISTRY, EXACT, replace(formats.codec("identity"), name=EXACT, principal=True))
    yield
    formats.codec.cache_clear()


def options(which, **others):
    keys, values = PAIRS[which]
    return {"keys": keys, "values": values, "preset": "balanced", "centre": None} | others


def assert_in_bases(cache, model, which="both"):
    assert_compressed(cache, model)
    for layer in cache.layers:
        for side, kept in (("keys", layer.keys), ("values", layer.values)):
            centre = kept.centre
            assert (centre is not None and principal.has_basis(centre.vectors, 2)) == (which in (side, "both"))
            if centre is not None and side == "values":
                assert not centre.mean.any() and (centre.balance == 1).all()
    assert "in the principal components of its first tokens" in str(report(model)) or which == "keys"


@pytest.mark.parametrize("which, name, kind", every_pair(PAIRS, MODELS, ("dynamic", "static")))
def test_components_equal_the_eager_model(which, name, kind):
    model = tiny(name, "sdpa")
    call, ours, dense = compiled(model, **options(which)), new_cache(kind, model), new_cache(kind, model)
    for ids in conversation():
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert_in_bases(ours, model, which)
    for mine, theirs in zip(ours.layers, dense.layers):
        torch.testing.assert_close(mine.keys.decode(), theirs.keys, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(mine.values.decode(), theirs.values, atol=2e-5, rtol=1e-5)


@EVERY_CACHE
def test_sinks_and_windows_lie_in_the_same_basis(kind):
    model = tiny("llama", "eager")
    call, ours, dense = compiled(model, **options("both", sinks=2, window=4)), *(new_cache(kind, model) for _ in "ab")
    for ids in conversation():
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert_in_bases(ours, model)


@EVERY_CACHE
def test_rows_that_are_padded_on_the_left_equal_the_eager_model(kind):
    model = tiny()
    assert_in_bases(padded(compiled(model, **options("both")), model, kind), model)


@pytest.mark.parametrize("name", BETWEEN)
def test_a_cache_that_eager_code_changed_goes_on_as_the_dense_one(name):
    model = tiny()
    assert_in_bases(changed(BETWEEN[name], compiled(model, **options("both")), model), model)


def test_beams_are_those_of_the_eager_model():
    model = tiny()
    ids, how = prompt(2, 20), {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **how)
    model.forward = compiled(model.forward, **options("both"))
    assert torch.equal(model.generate(ids, **how), expected)


@EVERY_CACHE
def test_a_dense_prompt_gets_its_basis_when_it_is_compressed(kind):
    model = tiny()
    call, ours, dense = compiled(model, **options("both")), new_cache(kind, model), new_cache(kind, model)
    first, *others = conversation()
    step(model, first, ours), step(model, first, dense)
    for ids in others:
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert_in_bases(ours, model)


@EVERY_CACHE
def test_codes_in_a_basis_are_read_as_they_decode(kind):
    """A step over codes says what the eager model says over a dense cache of the decoded numbers."""
    model = tiny()
    call, ours = compiled(model, keys="kvtc:3", values="kvtc:2", centre=None), new_cache(kind, model)
    first, *others = conversation()
    for ids in (first, *others[:2]):
        step(call, ids, ours)
    ids, dense, done = others[2], new_cache("dynamic", model), sum(CALLS[:3])
    said = step(call, ids, ours)
    assert_compressed(ours, model)
    held = [
        [each.decode()[:, :, : done + ids.shape[1]] for each in (layer.keys, layer.values)] for layer in ours.layers
    ]
    for index, kept in enumerate(held):
        dense.update(*(each[:, :, :done] for each in kept), index)
    # What the model makes of these tokens is in the cache already, as codes.
    dense.update = lambda keys, values, index, *rest, **options: held[index]
    assert_same(said, step(model, ids, dense))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_without_the_pass_that_finds_a_basis_a_cache_stays_dense_and_says_why(which, kind):
    model = tiny()
    call, ours = compiled(model, **options(which, disable=("centre",))), new_cache(kind, model)
    dense = new_cache(kind, model)
    for ids in conversation()[:3]:
        assert_same(step(call, ids, ours), step(model, ids, dense))
    for layer in ours.layers:
        sides = {"keys": layer.keys, "values": layer.values}
        assert not isinstance(sides.pop(which), CompressedKV)
        assert all(isinstance(each, CompressedKV) for each in sides.values())
    assert "in a basis of its own, and the pass that finds one is left out" in str(report(model))


def test_keys_whose_scores_are_changed_in_more_ways_than_by_a_mask_stay_dense():
    model = tiny("gemma2, softcap and window", "eager")
    call, ours, dense = compiled(model, **options("keys")), *(new_cache("dynamic", model) for _ in "ab")
    for ids in conversation()[:3]:
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert not any(isinstance(layer.keys, CompressedKV) for layer in ours.layers)
    assert "keeps it in a basis of its own, and more than a mask lies between" in str(report(model)).replace("\n", " ")


def test_strict_raises_where_a_basis_cannot_be_had():
    model = tiny()
    call = compiled(model, **options("keys", disable=("centre",), strict=True))
    with pytest.raises(Exception, match=r"strict=True.*in a basis of its own"):
        for ids in conversation()[:2]:
            step(call, ids, new_cache("dynamic", model))


@EVERY_CACHE
def test_inductor_gives_what_the_eager_inner_compiler_gives(kind):
    model = tiny()
    call, ours, dense = compiled(model, **options("both", inner="inductor")), *(new_cache(kind, model) for _ in "ab")
    for ids in conversation()[:3]:
        assert_same(step(call, ids, ours), step(model, ids, dense))
    assert_in_bases(ours, model)
