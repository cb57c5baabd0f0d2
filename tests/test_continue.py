"""What people do to a cache between two calls: reorder, select, repeat, crop, copy, reset, and continue by other means.

The dense model's own cache meets the same calls beside it, and every logit must be the same afterwards.
"""

import copy

import pytest
import torch
from checkpoints import assert_compressed, assert_same, cache_of, new_cache, prompt, step, tensors, tiny
from test_generate import LOSSLESS, LOSSY, assert_says_the_same, compile_forward, say

from tqcompile import CompressedKV
from tqcompile.formats import codec


class Pair:
    """One model untouched and one compiled, of the same weights, each with a cache that has read the same tokens."""

    def __init__(self, kind: str = "dynamic", options=LOSSLESS, rows: int = 2):
        self.dense = tiny()
        self.compiled = torch.compile(copy.deepcopy(self.dense), backend="turboquant", options=options)
        self.caches = new_cache(kind, self.dense), new_cache(kind, self.dense)
        for tokens, seed in ((5, 10), (1, 11), (1, 12)):
            self.read(prompt(rows, tokens, seed))

    @property
    def ours(self):
        """The cache of the compiled model."""
        return self.caches[1]

    def read(self, ids: torch.Tensor, caches=None, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """(dense, ours): logits of one more call."""
        dense, ours = caches or self.caches
        return step(self.dense, ids, dense, **inputs), step(self.compiled, ids, ours, **inputs)

    def each(self, change) -> None:
        """Do the same to both caches."""
        for cache in self.caches:
            change(cache)

    def assert_goes_on(self, rows: int = 2) -> None:
        """Three more calls say the same on both caches, and leave ours compressed."""
        for tokens, seed in ((1, 20), (1, 21), (3, 22)):
            dense, ours = self.read(prompt(rows, tokens, seed))
            assert_same(ours, dense)
        assert_compressed(self.ours, self.compiled)


CHANGES = {
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "crop": lambda cache: cache.crop(-3),
    "nothing": lambda cache: None,
}
ROWS = {"batch_select_indices": 1, "batch_repeat_interleave": 4}


@pytest.mark.parametrize("change", CHANGES)
def test_a_growing_cache_is_changed_between_calls(change):
    pair = Pair()
    pair.each(CHANGES[change])
    assert all(isinstance(tensor, CompressedKV) for tensor in tensors(pair.ours))
    pair.assert_goes_on(ROWS.get(change, 2))


@pytest.mark.parametrize("change", ["reorder_cache", "nothing"])
def test_a_static_cache_is_changed_between_calls(change):
    pair = Pair("static")
    pair.each(CHANGES[change])
    pair.assert_goes_on()


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"])
def test_codes_are_moved_and_not_coded_again(change):
    pair = Pair(options=LOSSY)
    expected = copy.deepcopy(pair.ours)
    for layer in expected.layers:
        layer.keys, layer.values = layer.keys.decode(), layer.values.decode()
    CHANGES[change](pair.ours)
    CHANGES[change](expected)
    for mine, dense in zip(tensors(pair.ours), tensors(expected)):
        assert isinstance(mine, CompressedKV)
        assert torch.equal(mine.decode(), dense)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_reset_is_as_good_as_new(kind):
    pair = Pair(kind)
    pair.each(lambda cache: cache.reset())
    pair.assert_goes_on()


def holding_the_same(caches):
    """Other caches that hold the very tensors of these; growing ones never write into them."""
    others = copy.copy(caches[0]), copy.copy(caches[1])
    for other in others:
        other.layers = [copy.copy(layer) for layer in other.layers]
    return others


FORKS = [("dynamic", copy.deepcopy), ("static", copy.deepcopy), ("dynamic", holding_the_same)]


@pytest.mark.parametrize(("kind", "fork"), FORKS)
def test_two_continuations_of_one_prefix(kind, fork):
    pair = Pair(kind)
    prefix = [tensor.decode() for tensor in tensors(pair.ours)]
    branches = [fork(pair.caches) for _ in range(2)]
    for seed in (30, 31, 32):
        for number, branch in enumerate(branches):
            dense, ours = pair.read(prompt(2, 1, seed + 100 * number), branch)
            assert_same(ours, dense)
    for branch in branches:
        assert_compressed(branch[1], pair.compiled)
    for before, after in zip(prefix, tensors(pair.ours)):
        assert torch.equal(before, after.decode())
    pair.assert_goes_on()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_eager_prefill_and_compiled_steps(kind):
    pair = Pair(kind)
    pair.caches = new_cache(kind, pair.dense), new_cache(kind, pair.dense)
    for cache in pair.caches:
        step(pair.dense, prompt(2, 9, 40), cache)
    assert not any(isinstance(tensor, CompressedKV) for tensor in tensors(pair.ours))
    pair.assert_goes_on()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_compiled_steps_and_then_the_model_as_it_was(kind):
    pair = Pair(kind)
    ids = prompt(2, 1, 50)
    assert_same(step(pair.dense, ids, pair.ours), step(pair.dense, ids, pair.caches[0]))
    pair.assert_goes_on()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_model_as_it_was_writes_codes_as_a_compiled_step_does(kind):
    pair = Pair(kind, LOSSY)
    other = copy.deepcopy(pair.ours)
    ids = prompt(2, 1, 50)
    step(pair.compiled, ids, pair.ours)
    step(pair.dense, ids, other)
    assert all(isinstance(tensor, CompressedKV) for tensor in tensors(other))
    # In the first layer both store the same keys and values, for no attention came before.
    for mine, theirs in zip(tensors(pair.ours)[:2], tensors(other)):
        assert torch.equal(mine.decode(), theirs.decode())


def test_left_padding():
    pair = Pair()
    pair.caches = new_cache("dynamic", pair.dense), new_cache("dynamic", pair.dense)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    for index, tokens in enumerate((5, 1, 1, 2)):
        end = (5, 6, 7, 9)[index]
        places = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        dense, ours = pair.read(prompt(2, tokens, 60 + index), attention_mask=mask[:, :end], position_ids=places)
        # What a padding token sees is nobody's concern, and differs between kernels.
        seen = mask[:, end - tokens : end].bool()
        assert_same(ours[seen], dense[seen])
    assert_compressed(pair.ours, pair.compiled)


def test_generate_with_left_padding():
    model, ids = tiny(), prompt(3, 7)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    dense = say(model, ids, attention_mask=mask)
    ours = say(compile_forward(model), ids, attention_mask=mask)
    assert_says_the_same(ours, dense)
    assert_compressed(cache_of(ours), model)


SEARCHES = {
    "beams": {"num_beams": 2},
    "beams that sample": {"num_beams": 3, "do_sample": True},
    "several answers": {"num_return_sequences": 3, "do_sample": True, "temperature": 0.8, "top_k": 20},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_search_and_sampling(search):
    model, ids, given = tiny(), prompt(2, 6), SEARCHES[search]
    torch.manual_seed(7)
    dense = say(model, ids, **given)
    torch.manual_seed(7)
    ours = say(compile_forward(model), ids, **given)
    assert torch.equal(ours.sequences, dense.sequences)
    assert_compressed(cache_of(ours), model)


def test_prompt_lookup():
    model, ids = tiny(), prompt(1, 4).repeat(1, 4)
    dense = say(model, ids, tokens=16)
    ours = say(compile_forward(model), ids, tokens=16, prompt_lookup_num_tokens=3)
    assert torch.equal(ours.sequences, dense.sequences)
    assert_compressed(cache_of(ours), model)


def test_an_assistant():
    model, ids = tiny(), prompt(1, 6)
    assistant = compile_forward(copy.deepcopy(model))
    with torch.no_grad():
        assistant.lm_head.weight += 0.05 * torch.randn_like(assistant.lm_head.weight)
    dense = say(model, ids, tokens=16)
    ours = say(compile_forward(model), ids, tokens=16, assistant_model=assistant)
    assert torch.equal(ours.sequences, dense.sequences)
    assert_compressed(cache_of(ours), model)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_chat_that_goes_on(kind):
    pair = Pair(kind)
    answers = []
    for model in (pair.dense, compile_forward(pair.compiled._orig_mod)):
        cache, said = new_cache(kind, model), prompt(1, 6)
        for turn in range(3):
            answer = say(model, said, tokens=4, past_key_values=cache)
            assert cache_of(answer) is cache
            said = torch.cat((answer.sequences, prompt(1, 3, 70 + turn)), -1)
        answers.append(answer)
    assert_says_the_same(answers[1], answers[0])
    assert_compressed(cache, model)


def test_a_grown_cache_is_written_once_its_past_is_gone():
    past = CompressedKV.encode(torch.randn(1, 2, 5, 16), codec("identity")).room(1, 2)
    grown = past.room(1, 2)
    view = past[:, :, :2]
    with pytest.raises(RuntimeError, match="another continues"):
        grown.zero_()
    del past
    with pytest.raises(RuntimeError, match="another continues"):
        grown.zero_()
    del view
    grown.zero_()
    assert torch.equal(grown.decode(), torch.zeros(1, 2, 7, 16))
