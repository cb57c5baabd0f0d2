"""Models as other people write them, each driven as its author would: `call(...)` is the model, compiled or not.

A module of `tests/models/` says itself what becomes of its caches:

- `EXPECT`: all of them are codes at the end (`compressed`), some (`partly`) or none (`dense`);
- `REFUSED`: the reasons, all of them, that the report gives for caches that a graph leaves dense; each that is dense at
  the end has a row of its own there, or there are `NAMES` rows;
- `DECODED`: the operators, all of them, that read a decoded copy;
- `TOLERANCE` (1e-5): what rounding may do, as a part of the largest logit;
- `CALLS`: how many tokens each call has with a lossy codec.
"""

import copy
import importlib
import pathlib

import pytest
import torch

import tqcompile

MODELS = sorted(path.stem for path in (pathlib.Path(__file__).parent / "models").glob("[a-z]*.py"))
VOCABULARY = 48

EVERY_MODEL = pytest.mark.parametrize("name", MODELS)

# Those whose keys can be centred, and of them those that rotate keys by their positions.
TURNED = {"fast", "index_copy"}
CENTRED = ("autocast", "fast", "index_copy", "lora", "nano", "printed", "relative_bias", "speculative")

# Tokens of each call: a prefill, single steps, several tokens at once; and another conversation with the same model.
FIRST, SECOND, SHORT = [7, 1, 1, 1, 1, 1, 3], [7, 1, 3], [6, 1]


def load(name):
    """A module of `models/`, and its model with weights that make attention sharp."""
    module = importlib.import_module(f"models.{name}")
    torch.manual_seed(0)
    model = module.make()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
    return module, model.requires_grad_(False).eval()


def prompt(length, seed=0):
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def converse(module, model, call, lengths, seed=0):
    """Logits [2, tokens, VOCABULARY] of a new conversation in calls of so many tokens, and its last state."""
    state, said = module.start(model), []
    for ids in prompt(sum(lengths), seed).split(lengths, dim=1):
        logits, state = module.feed(call, state, ids)
        assert logits.shape == (*ids.shape, VOCABULARY)
        said.append(logits.float().clone())
    return torch.cat(said, 1), state


def compiled(model, codec, **options):
    return torch.compile(
        model, backend="turboquant", options={"keys": codec, "values": codec, "inner": "eager"} | options
    )


def difference(ours, dense):
    """The largest, as a part of the largest logit."""
    assert ours.isfinite().all()
    return ((ours - dense).abs().max() / dense.abs().max()).item()


def tolerance(module):
    return getattr(module, "TOLERANCE", 1e-5)


def assert_as_expected(module, model, state):
    """What became of the live caches is what the module says, and the report says the same."""
    caches, report = module.caches(model, state), tqcompile.report(model)
    codes = [isinstance(cache, tqcompile.CompressedKV) for cache in caches]
    assert caches and set(codes) == {"compressed": {True}, "partly": {True, False}, "dense": {False}}[module.EXPECT]
    assert {id(cache) for cache, is_codes in zip(caches, codes) if is_codes} <= {id(cache) for cache in report.caches}
    assert (report.compressed_bytes > 0) == any(codes)
    reasons = getattr(module, "REFUSED", ())
    assert all(any(reason in refusal.reason for reason in reasons) for refusal in report.refusals), report
    assert all(any(reason in refusal.reason for refusal in report.refusals) for reason in reasons), report
    assert all(refusal.where for refusal in report.refusals)
    named = {refusal.name for refusal in report.refusals}
    assert len(named) >= getattr(module, "NAMES", codes.count(False)), report
    decoded = {fallback.operator for fallback in report.fallbacks}
    assert decoded == set(getattr(module, "DECODED", ())), report
    assert decoded or any(graph.reads for graph in report.graphs) == any(codes), report


@EVERY_MODEL
def test_a_model_says_the_same_in_one_call_as_in_many(name):
    module, model = load(name)
    many, _ = converse(module, model, model, FIRST)
    once, _ = converse(module, model, model, [sum(FIRST)])
    assert difference(many, once) < tolerance(module)


class Counted:
    """A compiled model that remembers how many graphs there were after each call."""

    def __init__(self, call):
        self.call, self.graphs = call, []

    def __call__(self, *args, **kwargs):
        result = self.call(*args, **kwargs)
        self.graphs.append(len(tqcompile.report().graphs))
        return result


@EVERY_MODEL
def test_a_lossless_codec_changes_nothing_and_the_steps_soon_need_no_new_graph(name):
    module, model = load(name)
    twin, call = copy.deepcopy(model), Counted(compiled(model, "identity"))
    for lengths, seed in ((FIRST, 0), (SECOND, 1)):
        ours, state = converse(module, model, call, lengths, seed)
        dense, _ = converse(module, twin, twin, lengths, seed)
        assert difference(ours, dense) < tolerance(module)
        assert_as_expected(module, model, state)
    assert call.graphs[3] == call.graphs[5], call.graphs


@pytest.mark.parametrize("name", CENTRED)
def test_centred_keys_with_first_and_last_tokens_as_they_are_change_nothing(name):
    module, model = load(name)
    twin, call = copy.deepcopy(model), compiled(model, "identity", centre=True, sinks=2, window=6)
    for lengths, seed in ((FIRST, 0), (SECOND, 1)):
        ours, state = converse(module, model, call, lengths, seed)
        dense, _ = converse(module, twin, twin, lengths, seed)
        assert difference(ours, dense) < tolerance(module)
    caches = (cache for cache in module.caches(model, state) if isinstance(cache, tqcompile.CompressedKV))
    turns = [cache.centre.rotation.turns for cache in caches if cache.centre is not None]
    assert turns and all(turning == (name in TURNED) for turning in turns)


@EVERY_MODEL
def test_bytes_stay_close_and_two_bits_show(name):
    module, model = load(name)
    calls = getattr(module, "CALLS", SHORT)
    dense, _ = converse(module, model, model, calls)
    errors = []
    for codec in ("turboquant:2",) if module.EXPECT == "dense" else ("turboquant:2", "q8_0"):
        own = copy.deepcopy(model)
        ours, state = converse(module, own, compiled(own, codec), calls)
        errors.append(difference(ours, dense))
        assert_as_expected(module, own, state)
    if module.EXPECT == "dense":
        assert errors[0] < tolerance(module)
    else:
        assert errors[1] < 0.05 < errors[0]


@pytest.mark.parametrize("name", ["fast", "latent", "nano", "softcap"])
def test_through_inductor_it_is_the_same(name):
    module, model = load(name)
    twin = copy.deepcopy(model)
    ours, state = converse(module, model, compiled(model, "identity", inner="inductor"), SHORT)
    dense, _ = converse(module, twin, twin, SHORT)
    assert difference(ours, dense) < tolerance(module)
    assert_as_expected(module, model, state)
