"""Models as other people write them, each driven as its author would: `call(...)` is the model, compiled or not.

A module of `tests/models/` says itself what becomes of its caches, in `EXPECT`:

- `compressed`: all of them are codes, and attention reads those;
- `decoded: NAME`: all of them are codes, and operator NAME reads a decoded copy;
- `partly: REASON; ...`, `dense: REASON; ...`: some or none are codes, and the report names each other one, with one of
  these reasons; `NAMES` counts the names where caches share one.

`TOLERANCE` (1e-5) is what rounding may do to the largest logit.
"""

import copy
import importlib
import pathlib

import pytest
import torch

import tqcompile

MODELS = sorted(path.stem for path in (pathlib.Path(__file__).parent / "models").glob("[a-z]*.py"))
VOCABULARY = 48
LOSSLESS, LOSSY = "lossless", "lossy"

# Defects that are known: which tests of a model they fail, and what is wrong.
DEFECTS = {
    "autocast": ((LOSSY,), "float16 scales are concatenated under autocast, which raises"),
    "functional": ((LOSSLESS, LOSSY), "a cache that slice_scatter makes anew stays dense without a word"),
    "fused_pair": ((LOSSLESS, LOSSY), "a cache [2, B, H, S, D] that is stacked anew stays dense without a word"),
    "hooks": ((LOSSLESS, LOSSY), "3-D caches of a graph that never writes them stay dense without a word"),
    "item": ((LOSSLESS, LOSSY), "values that one graph appends and the next one reads stay dense without a word"),
    "keys_transposed": ((LOSSLESS, LOSSY), "keys [B, H, D, S] are taken for values, and encoded anew at each step"),
    "recurrent": ((LOSSLESS, LOSSY), "a recurrent state that is copied over at each step is encoded each time"),
    "rolling": ((LOSSLESS, LOSSY), "a window that is cut stays dense"),
    "steps": ((LOSSLESS,), "a cache that grows by blocks stays dense"),
}


def every_model(test):
    """Parametrise by model, those with a defect that fails `test` marked."""
    marks = {name: () for name in MODELS}
    for name, (tests, reason) in DEFECTS.items():
        if test in tests:
            marks[name] = pytest.mark.xfail(strict=True, reason=reason, raises=(AssertionError, RuntimeError))
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


# Tokens of each call: a prefill, single steps, several tokens at once; and another conversation with the same model.
FIRST, SECOND, SHORT = [7, 1, 1, 1, 1, 1, 3], [4, 1, 3], [6, 1]


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


def is_compressed(cache):
    return isinstance(cache, tqcompile.CompressedKV)


def assert_as_expected(module, model, state):
    """What became of the live caches is what the module says, and the report says the same."""
    kind, _, detail = module.EXPECT.partition(": ")
    caches, report = module.caches(model, state), tqcompile.report(model)
    codes = [is_compressed(cache) for cache in caches]
    allowed = {"compressed": {True}, "decoded": {True}, "partly": {True, False}, "dense": {False}}
    assert caches and set(codes) == allowed[kind], f"{codes}\n{report}"
    assert {id(cache) for cache in caches if is_compressed(cache)} <= {id(cache) for cache in report.caches}
    assert (report.compressed_bytes > 0) == any(codes)
    expected = detail.split("; ") if detail and False in codes else []
    for refusal in report.refusals:
        assert refusal.where and any(reason in refusal.reason for reason in expected), report
    assert all(any(reason in refusal.reason for refusal in report.refusals) for reason in expected), report
    named = {refusal.name for refusal in report.refusals}
    assert len(named) >= getattr(module, "NAMES", codes.count(False)), report
    decoders = {detail} if kind == "decoded" else set()
    assert {fallback.operator for fallback in report.fallbacks} == decoders, report
    reads = any(graph.reads for graph in report.graphs)
    assert reads if kind in ("compressed", "partly") else not reads or kind == "decoded", report


@pytest.mark.parametrize("name", MODELS)
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


@every_model(LOSSLESS)
def test_a_lossless_codec_changes_nothing_and_the_steps_soon_need_no_new_graph(name):
    module, model = load(name)
    twin, call = copy.deepcopy(model), Counted(compiled(model, "identity"))
    for lengths, seed in ((FIRST, 0), (SECOND, 1)):
        ours, state = converse(module, model, call, lengths, seed)
        dense, _ = converse(module, twin, twin, lengths, seed)
        assert difference(ours, dense) < tolerance(module)
        assert_as_expected(module, model, state)
    assert call.graphs[3] == call.graphs[5], call.graphs


@every_model(LOSSY)
def test_bytes_stay_close_and_two_bits_show(name):
    module, model = load(name)
    dense, _ = converse(module, model, model, SHORT)
    is_dense, errors = module.EXPECT.startswith("dense"), []
    for codec in ("turboquant:2",) if is_dense else ("q8_0", "turboquant:2"):
        own = copy.deepcopy(model)
        ours, state = converse(module, own, compiled(own, codec), SHORT)
        errors.append(difference(ours, dense))
        assert_as_expected(module, own, state)
    if is_dense:
        assert errors[0] < tolerance(module)
    else:
        assert errors[0] < 0.05
        assert errors[1] > max(0.05, 3 * errors[0])


@pytest.mark.parametrize("name", ["fast", "nano", "softcap"])
def test_through_inductor_it_is_the_same(name):
    module, model = load(name)
    twin = copy.deepcopy(model)
    ours, state = converse(module, model, compiled(model, "identity", inner="inductor"), SHORT)
    dense, _ = converse(module, twin, twin, SHORT)
    assert difference(ours, dense) < tolerance(module)
    assert_as_expected(module, model, state)
