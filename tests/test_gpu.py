"""The whole path on a CUDA device: generated kernels inside a compiled model, and under CUDA graphs."""

import pytest
import torch
from checkpoints import VOCABULARY, new_cache, tensors, tiny
from conversations import conversations, fake_quantised
from models import EMBED, MODELS, Shape
from representatives import OF_DENSE, REPRESENTATIVES
from test_cache_shapes import CALLS, assert_compressed, talk

import tqcompile
from tqcompile import CompressedKV, formats
from tqcompile.kernels import integer

F = torch.nn.functional
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


# Signs of what a first term leaves: the smallest of them fall on either side of zero by the order of a sum.
RESIDUAL = [name for name in REPRESENTATIVES if any(term.fit == "sign" for term in formats.codec(name).terms[1:])]
CASES = [(kind, ("turboquant:5", "turboquant:3")) for kind in MODELS]
CASES += [("counter", formats.pair_of(name)) for name in OF_DENSE if name not in RESIDUAL]


@pytest.mark.parametrize("kind, codecs", CASES, ids=lambda part: part if isinstance(part, str) else "/".join(part))
def test_a_conversation_on_kernels_equals_a_quantised_dense_cache(kind, codecs):
    # One layer: the twin and the kernels round scores differently, and the codes of a second one may fall on either
    # side of an edge.
    worst, ours = talk(kind, Shape(layers=1, head_dim=64), codecs, CALLS, inner="inductor")
    assert worst < 2e-3
    assert_compressed(ours, codecs)
    assert all(cache.is_cuda for cache in ours.caches())


@pytest.mark.parametrize("codec", RESIDUAL)
def test_few_signs_of_a_residual_fall_on_the_other_side_of_zero(codec):
    ours, twin = conversations("counter", Shape(layers=1, head_dim=64), (codec, codec), inner="inductor")
    generator, worst = torch.Generator("cpu").manual_seed(1), 0.0
    for tokens in (5, 1, 1, 3, 4, 1, 6):
        x = torch.randn(2, tokens, EMBED, generator=generator, device="cpu").cuda()
        worst = max(worst, (ours.feed(x) - twin.feed(x)).abs().max().item())
    for cache, expected in zip(ours.caches(), twin.caches()):
        off = (cache.decode() - expected).abs().amax(-1)
        # Norms differ by the rounding of float16, less than a thousandth; one sign moves a token by a tenth.
        assert (off > 2e-3).float().mean() <= 0.05 and off.max() < 0.2
    assert worst < 5e-2
    assert_compressed(ours, (codec, codec))


@pytest.mark.parametrize("reader", ["sdpa_mask", "sdpa_gqa_scale", "eager_matmul", "softcap", "sinks"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 6e-2)], ids=str)
def test_half_precision_differs_by_its_own_rounding(reader, dtype, tolerance):
    # A number that its rounding takes over an edge has another code than in the twin, which rounds elsewhere.
    shape = Shape(layers=1, head_dim=128, heads=8, dtype=dtype, reader=reader)
    worst, ours = talk("counter", shape, ("turboquant:4", "turboquant:3"), [5, 1, 1, 3, 1], inner="inductor")
    assert worst < tolerance
    assert_compressed(ours, ("turboquant:4", "turboquant:3"))


@torch.no_grad()
def test_a_growing_cache_under_a_padding_mask_compiles_a_prefill_and_a_step():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny()
    call, cache = torch.compile(model, backend="turboquant"), new_cache("dynamic", model)
    seen = torch.ones(2, 0, dtype=torch.int64)
    for tokens in (9, *[1] * 12):
        seen = torch.cat([seen, torch.ones(2, tokens, dtype=torch.int64)], 1)
        seen[0, :2] = 0
        call(torch.randint(0, VOCABULARY, (2, tokens)), attention_mask=seen, past_key_values=cache, use_cache=True)
    # The lengths of a mask are learnt from two of them.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert all(isinstance(tensor, CompressedKV) and tensor.is_cuda for tensor in tensors(cache))


@pytest.mark.parametrize("kind", ["buffers", "counter"])
def test_reduce_overhead_replays_cuda_graphs_over_compressed_caches(kind):
    torch.manual_seed(0)
    shape = Shape(length=64, head_dim=64)
    model, eager = MODELS[kind](shape), MODELS[kind](shape)
    eager.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend=tqcompile.turboquant(keys="q8_0", values="q8_0"), mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for position in range(12):
            x = torch.randn(shape.batch, 1, EMBED)
            place = (torch.tensor([position]),) if kind == "buffers" else ()
            ours, dense = compiled(x, *place).clone(), eager(x, *place)
            assert (ours - dense).abs().max() < 2e-2
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_reduce_overhead_says_what_the_default_mode_says_on_int8_units():
    torch.manual_seed(0)
    # What is kept for the kernels must be made before the capture, also where no test was here before.
    integer.table_of.cache_clear()
    model, twin = (MODELS["buffers"](Shape(length=200, head_dim=64, dtype=torch.bfloat16)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    backend = tqcompile.turboquant(keys="turboquant:5", values="turboquant:3")
    graphed, plain = torch.compile(model, backend=backend, mode="reduce-overhead"), torch.compile(twin, backend=backend)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for position in range(12):
            x, place = torch.randn(2, 1, EMBED, dtype=torch.bfloat16), torch.tensor([position])
            torch.testing.assert_close(graphed(x, place).clone(), plain(x, place), rtol=0, atol=1e-2)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


WINDOW = 40


def slide(q, k, v, past):
    """A window that is cut off a growing past: its first token lies anywhere in a buffer."""
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    return F.scaled_dot_product_attention(q, k, v), (k[:, :, -WINDOW:], v[:, :, -WINDOW:])


@pytest.mark.parametrize("codecs", [("turboquant:4", "turboquant:3"), ("q8_0", "q8_0")], ids="/".join)
def test_a_window_slides_over_kernels(codecs):
    torch.manual_seed(0)
    call = torch.compile(slide, backend=tqcompile.turboquant(keys=codecs[0], values=codecs[1]))
    ours = twin = None
    with torch.no_grad():
        for tokens in (WINDOW, *[1] * 60):
            q, k, v = (torch.randn(2, heads, tokens, 64) for heads in (2, 2, 2))
            stored = (k, v) if twin is None else tuple(map(fake_quantised, (k, v), codecs))
            first, (out, ours) = twin is None, call(q, k, v, ours)
            expected, twin = slide(q, *stored, twin)
            twin = tuple(map(fake_quantised, twin, codecs)) if first else twin
            assert (out - expected).norm() < 2e-3 * expected.norm()
    assert all(isinstance(cache, CompressedKV) and cache.shape[2] == WINDOW for cache in ours)


def test_keys_of_one_head_beside_values_of_four_are_right():
    """No kernel takes both: it would count the heads of one for those of the other."""

    def step(q, k, v, at, keys, values):
        keys[:, :, at], values[:, :, at] = k, v
        return F.scaled_dot_product_attention(q, keys[:, :1].repeat_interleave(4, 1), values)

    torch.manual_seed(0)
    held, twin = ([torch.zeros(2, 4, 16, 64) for _ in range(2)] for _ in range(2))
    call = torch.compile(step, backend=tqcompile.turboquant(preset="lossless"))
    with torch.no_grad():
        for place in range(4):
            at, (q, k, v) = torch.tensor([place]), (torch.randn(2, 4, 1, 64) for _ in range(3))
            torch.testing.assert_close(call(q, k, v, at, *held), step(q, k, v, at, *twin), rtol=1e-4, atol=1e-5)
    assert all(isinstance(cache, CompressedKV) for cache in held)
