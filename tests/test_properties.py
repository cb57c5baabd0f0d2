"""Models, calls and spellings that nobody chose: whatever is drawn, the compressed model equals its twin."""

import pytest
import torch
from conversations import conversations, fake_quantised
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from models import EMBED, MODELS, Shape
from readers import READERS
from torch.nn import functional as F

import tqcompile
from tqcompile import CompressedKV, formats
from tqcompile.report import clear

CREATES = ("tuples", "made")
LENGTH = 32
# Attention in half precision rounds scores, weights and sums where the codes' own keeps float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}

head_dims = st.sampled_from([2, 7, 8, 16, 32, 33, 48, 64, 96])
# What is kept in a basis of its own is no code of what a dense cache holds.
names = sorted(name for name, codec in formats.REGISTRY.items() if not codec.principal)
codecs = st.tuples(st.sampled_from(names), st.sampled_from([name for name in names if name in formats.FOR_VALUES]))


@st.composite
def shapes(draw, dtypes=(torch.float32,), layers=(1,)) -> Shape:
    kv_heads = draw(st.integers(1, 3))
    return Shape(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(head_dims),
        layers=draw(st.sampled_from(layers)),
        length=LENGTH,
        dtype=draw(st.sampled_from(dtypes)),
        reader=draw(st.sampled_from(sorted(READERS))),
    )


@st.composite
def calls(draw) -> list:
    """Numbers of tokens, each compiled or eager, and starts of another conversation, that fit in a cache."""
    step = st.tuples(st.sampled_from([1, 1, 1, 2, 3, 6]), st.sampled_from([False, False, False, True]))
    episodes = draw(st.lists(st.lists(step, min_size=1, max_size=5), min_size=1, max_size=2))
    script = []
    for episode in episodes:
        script += [draw(st.sampled_from(["again", "reset"]))] if script else []
        script += episode
    return script


def assume_defined(codecs: tuple[str, str], head_dim: int) -> None:
    """A cache whose vectors are too short for its codec stays dense, which tests of refusals look at."""
    assume(all(head_dim >= formats.codec(name).minimum_head_dim for name in codecs))


def talk(kind: str, shape: Shape, codecs: tuple[str, str], script: list, inner: str = "eager") -> None:
    """Hold the same conversation with a compiled model and its twin."""
    assume_defined(codecs, shape.head_dim)
    torch._dynamo.reset()
    clear()
    ours, twin = conversations(kind, shape, codecs, inner=inner)
    generator, dense = torch.Generator().manual_seed(1), True
    with torch.random.fork_rng():
        for at, call in enumerate(script):
            if isinstance(call, str):
                getattr(ours, call)(), getattr(twin, call)()
                dense = dense or kind in CREATES
                continue
            tokens, eager = call
            before = dense
            # An eager call leaves a cache dense that is dense, and a twin is quantised once.
            eager = eager and (not dense or at == 0)
            x = torch.randn(shape.batch, tokens, EMBED, generator=generator).to(shape.dtype)
            exact = before and (eager or (kind in CREATES and ours.filled == 0))
            out, expected = ours.feed(x, eager=eager), twin.feed(x, exact=exact)
            torch.testing.assert_close(out, expected, atol=TOLERANCE[shape.dtype], rtol=TOLERANCE[shape.dtype] / 10)
            dense = dense and eager
    if not dense and ours.caches():
        assert all(isinstance(cache, CompressedKV) for cache in ours.caches())
    assert not tqcompile.report(ours.model).refusals and not tqcompile.report(ours.model).fallbacks


KINDS = pytest.mark.parametrize("kind", MODELS)
identical = {"shape": shapes(tuple(TOLERANCE), layers=(1, 2)), "script": calls()}
# One layer, in float32: the tokens to store are the same to the last bit, so no code falls over an edge.
coded = {"shape": shapes(), "codecs": codecs, "script": calls()}


@KINDS
@settings(max_examples=4)
@given(**identical)
def test_a_lossless_cache_changes_nothing(kind, shape, script):
    talk(kind, shape, ("identity", "identity"), script)


@KINDS
@settings(max_examples=6)
@given(**coded)
def test_a_codec_changes_what_it_changes_in_a_dense_cache(kind, shape, codecs, script):
    talk(kind, shape, codecs, script)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@settings(max_examples=40)
@given(**identical)
def test_many_lossless_caches_change_nothing(inner, kind, shape, script):
    talk(kind, shape, ("identity", "identity"), script, inner)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@settings(max_examples=40)
@given(**coded)
def test_many_codecs_change_what_they_change_in_a_dense_cache(inner, kind, shape, codecs, script):
    talk(kind, shape, codecs, script, inner)


# Where batch, heads and tokens lie in a stored cache, whose last dimension is a head's.
LAYOUTS = ["bhs", "bsh", "sbh", "hbs", "hsb", "shb"]


def reorder(x, have: str, want: str, how: str):
    """`x` with its leading dimensions `have` brought to the order `want`, in one of several spellings."""
    order = [have.index(letter) for letter in want]
    if how == "permute":
        return x.permute(*order, 3)
    if how == "torch.permute":
        return torch.permute(x, (*order, -1))
    letters = list(have)
    for at, letter in enumerate(want):
        other = letters.index(letter)
        if other != at:
            x = x.transpose(at, other) if how == "transpose" else torch.swapaxes(x, other, at)
            letters[at], letters[other] = letters[other], letters[at]
    return x


REORDERS = st.sampled_from(["permute", "torch.permute", "transpose", "swapaxes"])


def write(cache, tokens, have: str, at, start: int, how: str):
    """Put `tokens`, in the cache's own order of dimensions, at `at`, which are the places from `start` on."""
    dim, count = have.index("s"), tokens.shape[have.index("s")]
    everything = [slice(None)] * dim
    if how == "index_copy_":
        cache.index_copy_(dim, at, tokens)
    elif how == "positions":
        cache[(*everything, at)] = tokens
    elif how == "slice":
        cache[(*everything, slice(start, start + count))] = tokens
    elif how == "narrow":
        cache.narrow(dim, start, count).copy_(tokens)
    elif how == "ellipsis":
        cache[(..., slice(start, start + count), *[slice(None)] * (3 - dim))] = tokens
    elif how == "view first":
        reorder(cache, have, "bhs", "transpose")[:, :, at] = reorder(tokens, have, "bhs", "permute")
    elif how == "copy of a slice":
        cache[(*everything, slice(start, start + count))].copy_(tokens)
    else:
        for place in range(count):
            cache.select(dim, start + place).copy_(tokens.select(dim, place))


WRITES = "index_copy_", "positions", "slice", "narrow", "ellipsis", "view first", "copy of a slice", "token by token"

# What a program may do to [b, h, s, d] on the way to attention; none of it changes the numbers.
DETOURS = {
    "nothing": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "there and back": lambda x: x.transpose(1, 2).transpose(1, 2),
    "all of it": lambda x: x[:, :, :],
    "same view": lambda x: x.reshape(x.shape),
    "unsqueezed": lambda x: x[:, :, None].reshape(x.shape),
    "a column in front": lambda x: x.unsqueeze(1).permute(0, 2, 1, 3, 4).reshape(x.shape),
    "cast": lambda x: x.to(torch.float32),
    "detached": lambda x: x.detach(),
    "cloned": lambda x: x.clone(),
    "expanded": lambda x: x.expand(-1, -1, -1, -1),
}


def prefix(x, length: int, how: str):
    """The first tokens of [b, h, s, d]."""
    return x if how == "whole" else x[:, :, :length] if how == "slice" else x.narrow(2, 0, length)


def repeated(x, times: int, how: str):
    if times == 1:
        return x
    if how == "repeat_interleave":
        return x.repeat_interleave(times, dim=1)
    batch, heads, length, dim = x.shape
    column = x[:, :, None] if how == "expand" else x.unsqueeze(2)
    return column.expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)


def attend(q, k, v, bias, how: str):
    scale = q.shape[-1] ** -0.5
    if how == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    if how == "einsum":
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        return torch.einsum("bhqk,bhkd->bhqd", (scores * scale + bias).softmax(-1), v)
    turned = {"mT": lambda: k.mT, "transpose": lambda: k.transpose(2, 3), "permute": lambda: k.permute(0, 1, 3, 2)}
    scores = torch.matmul(q * scale, turned[how]()) + bias
    return torch.matmul(F.softmax(scores, -1), v)


program = st.fixed_dictionaries(
    {
        "layout": st.tuples(*2 * [st.sampled_from(LAYOUTS)]),
        "write": st.sampled_from(WRITES),
        "reorder": st.tuples(REORDERS, REORDERS),
        "detour": st.tuples(*2 * [st.sampled_from(sorted(DETOURS))]),
        "late": st.booleans(),
        "prefix": st.sampled_from(["whole", "slice", "narrow"]),
        "repeat": st.sampled_from(["expand", "unsqueeze", "repeat_interleave"]),
        "attend": st.sampled_from(["sdpa", "einsum", "mT", "transpose", "permute"]),
    }
)


def spelled(program: dict):
    """A step of attention as `program` spells it."""

    def step(q, k, v, at, start: int, keys, values):
        seen, length = [], start + q.shape[2]
        for side, (cache, tokens) in enumerate(((keys, k), (values, v))):
            have, how, detour = program["layout"][side], program["reorder"][side], DETOURS[program["detour"][side]]
            write(cache, reorder(tokens, "bhs", have, how), have, at, start, program["write"][side])
            x = reorder(cache, have, "bhs", how)
            x = prefix(x if program["late"] else detour(x), length, program["prefix"])
            x = repeated(x, q.shape[1] // x.shape[1], program["repeat"])
            seen.append(detour(x) if program["late"] else x)
        positions = torch.arange(seen[0].shape[2])
        bias = torch.zeros(q.shape[2], positions.shape[0]).masked_fill(positions > at[:, None], float("-inf"))
        return attend(q, *seen, bias, program["attend"])

    return step


def follow(keys: str, program: dict, codecs: tuple[str, str], heads: int, head_dim: int, lengths: list[int]) -> None:
    """Run a step whose keys are written by `keys`, on compressed and on quantised dense caches."""
    torch._dynamo.reset()
    clear()
    step = spelled({**program, "write": (keys, program["write"])})
    assume_defined(codecs, head_dim)
    options = {"keys": codecs[0], "values": codecs[1], "inner": "eager"}
    compiled = torch.compile(step, backend="turboquant", options=options)
    generator, start = torch.Generator().manual_seed(7), 0
    size = {"b": 2, "h": 2, "s": 12}
    held = [torch.randn(*(size[letter] for letter in have), head_dim) for have in program["layout"]]
    twin = [fake_quantised(dense, codec) for dense, codec in zip(held, codecs)]
    for tokens in lengths:
        q, k, v = (torch.randn(2, h, tokens, head_dim, generator=generator) for h in (2 * heads, 2, 2))
        at = torch.arange(start, start + tokens)
        with torch.no_grad():
            out = compiled(q, k, v, at, start, *held)
            expected = step(q, *map(fake_quantised, (k, v), codecs), at, start, *twin)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-6)
        start += tokens
    report = tqcompile.report()
    for cache, dense in zip(held, twin):
        assert isinstance(cache, CompressedKV), report
        torch.testing.assert_close(cache.decode(), dense, atol=1e-6, rtol=1e-6)
    assert not report.refusals and not report.fallbacks, report


spellings = {
    "program": program,
    "codecs": codecs,
    "heads": st.integers(1, 3),
    "head_dim": st.sampled_from([8, 32, 33, 64]),
    "lengths": st.lists(st.integers(1, 3), min_size=1, max_size=3),
}


REPEATED_THEN_UNSQUEEZED = {
    "layout": ("bhs", "shb"),
    "write": "positions",
    "reorder": ("permute", "transpose"),
    "detour": ("unsqueezed", "a column in front"),
    "late": True,
    "prefix": "whole",
    "repeat": "expand",
    "attend": "sdpa",
}


@pytest.mark.parametrize("keys", WRITES)
@settings(max_examples=6)
@given(**spellings)
@example(program=REPEATED_THEN_UNSQUEEZED, codecs=("q8_0", "identity"), heads=2, head_dim=8, lengths=[2, 1])
def test_any_spelling_of_writes_and_reads_is_followed(keys, program, codecs, heads, head_dim, lengths):
    follow(keys, program, codecs, heads, head_dim, lengths)


@pytest.mark.slow
@pytest.mark.parametrize("keys", WRITES)
@settings(max_examples=80)
@given(**spellings)
def test_many_spellings_of_writes_and_reads_are_followed(keys, program, codecs, heads, head_dim, lengths):
    follow(keys, program, codecs, heads, head_dim, lengths)
