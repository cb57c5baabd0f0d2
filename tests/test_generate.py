"""`generate` of the transformers package over compressed caches, by each way that one line can ask for them.

With the lossless codec every token and logit must be what the untouched model says.
"""

import copy

import pytest
import torch
from checkpoints import assert_compressed, assert_same, cache_of, prompt, tensors, tiny
from transformers import CompileConfig

import tqcompile
from tqcompile import CompressedKV

LOSSLESS = {"preset": "lossless", "inner": "eager"}
LOSSY = {"preset": "balanced", "inner": "eager"}
MODELS = (
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("qwen2, biases", "sdpa"),
    ("gpt2, learned positions", "sdpa"),
)
WINDOWED = "gemma2, softcap and window"


def say(model, ids, tokens: int = 10, **given):
    """Generate greedily, with the logits and the cache; `given` changes what it likes."""
    settings = {"max_new_tokens": tokens, "do_sample": False, **given}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)


def compile_forward(model, options=LOSSLESS, **given):
    """The one line of the README."""
    model.forward = torch.compile(model.forward, backend="turboquant", options=options, **given)
    return model


def assert_says_the_same(ours, dense) -> None:
    assert torch.equal(ours.sequences, dense.sequences)
    assert len(ours.logits) == len(dense.logits)
    for mine, theirs in zip(ours.logits, dense.logits):
        assert_same(mine, theirs)


@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_a_growing_cache(name, attention):
    model, ids = tiny(name, attention), prompt(2, 6)
    dense = say(model, ids)
    ours = say(compile_forward(model), ids)
    assert_says_the_same(ours, dense)
    assert_compressed(cache_of(ours), model)


def through_options(monkeypatch):
    return {"backend": "turboquant", "options": LOSSLESS}


def through_a_backend(monkeypatch):
    return {"backend": tqcompile.turboquant(**LOSSLESS)}


def through_the_environment(monkeypatch):
    monkeypatch.setenv("TQCOMPILE_OPTIONS", "preset=lossless,inner=eager")
    return {"backend": "turboquant"}


@pytest.mark.parametrize("options", [through_options, through_a_backend, through_the_environment])
def test_a_module_compiled_in_place(options, monkeypatch):
    model, ids = tiny(), prompt(2, 6)
    dense = say(model, ids)
    model.compile(**options(monkeypatch))
    ours = say(model, ids)
    assert_says_the_same(ours, dense)
    assert_compressed(cache_of(ours), model)
    assert {cache.codec.name for cache in tensors(cache_of(ours))} == {"identity"}


def asked_for(**given) -> dict:
    """What makes generate compile its steps over a static cache; without the attribute, on accelerators only."""
    config = CompileConfig(**given)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("options", [through_options, through_a_backend, through_the_environment])
def test_a_static_cache_compiled_by_generate(options, monkeypatch):
    model, ids = tiny(), prompt(2, 6)
    dense = say(model, ids, cache_implementation="static", disable_compile=True)
    ours = say(model, ids, **asked_for(mode=None, **options(monkeypatch)))
    assert_says_the_same(ours, dense)
    assert_compressed(cache_of(ours), model)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_layer_with_a_window_beside_one_without(kind):
    """More tokens than the window holds; its layer may stay dense, and the report then says so."""
    model, ids = tiny(WINDOWED, "eager"), prompt(2, 6)
    if kind == "static":
        dense = say(model, ids, cache_implementation="static", disable_compile=True)
        ours = say(model, ids, **asked_for(mode=None, backend=tqcompile.turboquant(**LOSSLESS)))
    else:
        dense = say(model, ids)
        ours = say(compile_forward(model), ids)
    assert_says_the_same(ours, dense)
    windowed, full = cache_of(ours).layers
    assert isinstance(full.keys, CompressedKV) and isinstance(full.values, CompressedKV)
    refused = {refusal.name for refusal in tqcompile.report(model).refusals}
    for name in ("keys", "values"):
        said = any(path.endswith(f"layers[0].{name}") for path in refused)
        assert said or isinstance(getattr(windowed, name), CompressedKV)
    assert len(refused) <= 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_inductor(cache):
    model, ids = tiny(), prompt(2, 6)
    dense = say(model, ids)
    options = {"preset": "lossless"}
    if cache == "static":
        # No mode is given: it is then the one that generate itself compiles with.
        ours = say(model, ids, **asked_for(backend=tqcompile.turboquant(**options)))
    else:
        ours = say(compile_forward(model, options), ids)
    assert_says_the_same(ours, dense)
    assert_compressed(cache_of(ours), model)


def test_inductor_says_what_eager_says_with_a_codec():
    model, ids = tiny(), prompt(2, 6)
    runs = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        other = compile_forward(copy.deepcopy(model), {"preset": "quality", "inner": inner})
        runs.append(say(other, ids))
        assert_compressed(cache_of(runs[-1]), other)
    assert_says_the_same(*runs)


def test_one_graph_without_breaks():
    model, ids = tiny(), prompt(2, 6)
    dense = say(model, ids)
    ours = say(compile_forward(model, fullgraph=True), ids)
    assert_says_the_same(ours, dense)
    assert_compressed(cache_of(ours), model)


def test_a_third_answer_compiles_nothing():
    model = compile_forward(tiny())
    # Two lengths of prompt are what Dynamo needs to see that there are more.
    for tokens in (6, 23):
        say(model, prompt(2, tokens), tokens=4)
    compiled = len(tqcompile.report(model).graphs)
    answer = say(model, prompt(2, 15), tokens=50)
    assert len(tqcompile.report(model).graphs) == compiled
    assert_compressed(cache_of(answer), model)
