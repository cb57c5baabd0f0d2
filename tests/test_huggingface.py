"""Models of the transformers package called by hand, on their own growing and static caches."""

import pytest
import torch
from checkpoints import assert_compressed, assert_same, new_cache, prompt, step, tiny

CALLS = [prompt(2, tokens, 50 + index) for index, tokens in enumerate((6, 1, 1, 3, 1))]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_identity_equals_the_eager_model(kind, attention):
    model = tiny("llama", attention)
    compiled = torch.compile(model, backend="turboquant", options={"preset": "lossless", "inner": "eager"})
    ours, dense = new_cache(kind, model), new_cache(kind, model)
    for ids in CALLS:
        assert_same(step(compiled, ids, ours), step(model, ids, dense))
    assert_compressed(ours, model)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_codec_comes_close_and_a_second_cache_starts_clean(kind):
    model = tiny()
    compiled = torch.compile(model, backend="turboquant", options={"preset": "quality", "inner": "eager"})
    for _ in range(2):
        ours, dense = new_cache(kind, model), new_cache(kind, model)
        for ids in CALLS:
            mine, theirs = step(compiled, ids, ours), step(model, ids, dense)
            assert (mine - theirs).norm() < 0.02 * theirs.norm()
        assert_compressed(ours, model)
