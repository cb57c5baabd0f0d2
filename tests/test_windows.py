"""Windows that slide: caches that keep the last tokens, by cutting, rolling or joining, and never drift."""

import pytest
import torch
from checkpoints import assert_compressed, assert_same, new_cache, prompt, step, tensors, tiny
from conversations import fake_quantised
from representatives import every_pair

import tqcompile
from tqcompile import CompressedKV, formats

F = torch.nn.functional
WINDOW, HEADS, DIM = 6, 2, 32
# Below the window, over it in one call, token by token, and in chunks.
CALLS = {
    "from below": (3, 1, 1, 1, 1, 1, 2, 1),
    "over it at once": (9, 1, 1, 4, 1, 1, 1, 1),
    "long": (2, *[1] * 30),
}


def cut(q, k, v, past, filled):
    """A past that grows by `cat` and of which the last WINDOW - 1 tokens are kept."""
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    positions = torch.arange(k.shape[2])
    mask = positions <= torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    mask = mask & (positions > torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - WINDOW)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out, (k[:, :, -WINDOW + 1 :], v[:, :, -WINDOW + 1 :])


def rolled(q, k, v, past, filled):
    """Tensors of WINDOW tokens: filled by position, then rolled by one, or joined and copied back."""
    keys, values = past
    for cache, tokens in ((keys, k), (values, v)):
        if tokens.shape[2] > 1:
            cache.copy_(torch.cat([cache, tokens], 2)[:, :, -WINDOW:])
        else:
            moved = cache.roll(-1, dims=2)
            moved[:, :, torch.tensor([-1])] = tokens
            cache.copy_(moved)
    return F.scaled_dot_product_attention(q, keys, values), past


def ring(q, k, v, past, filled):
    """Tensors of WINDOW tokens, the oldest of which is written over."""
    keys, values = past
    places = torch.arange(filled, filled + q.shape[2]) % WINDOW
    keys[:, :, places[-WINDOW:]] = k[:, :, -WINDOW:]
    values.index_copy_(2, places[-WINDOW:], v[:, :, -WINDOW:])
    return F.scaled_dot_product_attention(q, keys, values), past


STEPS = {"cut": cut, "rolled": rolled, "ring": ring}
CODECS = [("identity", "identity"), ("turboquant:3", "q8_0")]
WINDOWED = [("gemma2, softcap and window", "eager"), ("mistral, window", "sdpa")]


def new(kind):
    return None if kind == "cut" else tuple(torch.zeros(1, HEADS, WINDOW, DIM) for _ in range(2))


@torch.no_grad()
@pytest.mark.parametrize("kind, calls, codecs", every_pair(STEPS, CALLS, CODECS))
def test_a_window_holds_the_codes_of_its_tokens_as_they_were_first_made(kind, codecs, calls):
    generator = torch.Generator().manual_seed(5)
    options = {"keys": codecs[0], "values": codecs[1], "inner": "eager"}
    call = torch.compile(STEPS[kind], backend="turboquant", options=options)
    ours, twin, filled, seen = new(kind), new(kind), 0, []
    for number, tokens in enumerate(CALLS[calls]):
        q, k, v = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(3))
        seen.append((k, v))
        stored = tuple(map(fake_quantised, (k, v), codecs))
        out, ours = call(q, k, v, ours, filled)
        # A graph that makes a cache attends over its own exact numbers.
        exact = kind == "cut" and number == 0
        expected, twin = STEPS[kind](q, *((k, v) if exact else stored), twin, filled)
        twin = tuple(map(fake_quantised, twin, codecs)) if exact else twin
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        filled += tokens
    assert all(isinstance(cache, CompressedKV) for cache in ours), tqcompile.report()
    if kind != "ring" and filled >= WINDOW:
        for place, (cache, codec) in enumerate(zip(ours, codecs)):
            tokens = torch.cat([pair[place] for pair in seen], 2)[:, :, -cache.shape[2] :]
            made = CompressedKV.encode(tokens, formats.codec(codec))
            torch.testing.assert_close(cache.decode(), made.decode(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_window_that_slides_takes_the_room_of_a_window():
    call = torch.compile(cut, backend="turboquant", options={"preset": "quality", "inner": "eager"})
    past, held = None, set()
    for number in range(200):
        q, k, v = torch.randn(3, 1, HEADS, 1, DIM)
        _, past = call(q, k, v, past, number)
        held.add(past[0].nbytes)
    width = sum(plane.shape[-1] * plane.element_size() for plane in past[0].planes)
    assert max(held) <= (WINDOW + 33) * HEADS * width


@pytest.mark.parametrize(
    "kind, model, calls", every_pair(("dynamic", "static"), WINDOWED, [(6, 1, 1, 3, 1, 1, 1, 4, 1), (12, 1, 3, 1)])
)
def test_windows_of_transformers_equal_the_eager_model(kind, model, calls):
    model = tiny(*model)
    compiled = torch.compile(model, backend="turboquant", options={"preset": "lossless", "inner": "eager"})
    for _ in range(2):
        ours, dense = new_cache(kind, model), new_cache(kind, model)
        for index, count in enumerate(calls):
            ids = prompt(2, count, 50 + index)
            assert_same(step(compiled, ids, ours), step(model, ids, dense))
        assert all(mine.shape == theirs.shape for mine, theirs in zip(tensors(ours), tensors(dense)))
    if kind == "dynamic":
        assert_compressed(ours, model)
    else:
        # A static prefill over a window writes it and attends over its own tokens: the next graph takes it up.
        assert all(isinstance(tensor, CompressedKV) for tensor in tensors(ours)), tqcompile.report(model)
