"""What is alive between calls, and what a step makes for its own use: bytes counted, never seconds."""

import gc
import math
import weakref
from dataclasses import dataclass

import pytest
import torch
from conversations import conversations
from models import EMBED, MODELS, Shape
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

import tqcompile
from tqcompile import cache, reference
from tqcompile.layout import layout_of
from tqcompile.passes import rewrite

KINDS = pytest.mark.parametrize("kind", MODELS)
CODECS = ("turboquant:4", "q8_0")
GROWS, MAKES = ("tuples",), ("tuples", "made")
BLOCK = 4 * reference.BLOCK_ELEMENTS
OURS = ("tqcompile::attend", "tqcompile::logits", "tqcompile::mix")

# A dense cache of it is sixteen times a block of 4096 tokens: nothing that holds one is overlooked.
WIDE = {"batch": 1, "heads": 8, "kv_heads": 8, "head_dim": 128, "layers": 1}


@dataclass
class Traffic:
    """Memory events of some calls: each allocation outside and inside of attention, and the most alive at once."""

    outside: list[int]
    inside: list[int]
    operators: list[str]
    peak: int
    left: int

    @property
    def largest(self) -> int:
        return max((*self.outside, *self.inside))


def traffic(call) -> Traffic:
    """What `call` allocates on the CPU, in any compiled code."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    found, alive, until = Traffic([], [], [], 0, 0), 0, 0
    for event in events:
        if event.name() in OURS:
            until = max(until, event.end_ns())
        is_inside = event.start_ns() <= until
        if event.name() != "[memory]":
            found.operators += [] if is_inside else [event.name()]
            continue
        alive += event.nbytes()
        found.peak = max(found.peak, alive)
        if event.nbytes() > 0:
            (found.inside if is_inside else found.outside).append(event.nbytes())
    found.left = alive
    return found


def step_traffic(conversation) -> Traffic:
    return traffic(lambda: conversation.feed(tokens(1, conversation.model.shape)))


def live_tensors(least: int) -> list[torch.Tensor]:
    """All dense tensors that Python holds with at least so many bytes of memory behind them."""
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    plain = (t for t in tensors if type(t) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer))
    return [t for t in plain if t.device.type == "cpu" and t.untyped_storage().nbytes() >= least]


def dense_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def code_bytes(tensor: tqcompile.CompressedKV) -> int:
    layout = layout_of(tensor.codec, tensor.shape[-1], tensor.dtype, "cpu")
    return tensor.shape[:-1].numel() * layout.bytes_per_token


def tokens(count: int, shape: Shape) -> torch.Tensor:
    return torch.randn(shape.batch, count, EMBED)


def filled(kind: str, length: int, inner: str = "eager", **like):
    """A conversation with compressed caches of about `length` tokens, some steps in."""
    shape = Shape(**{**WIDE, **like}, length=length)
    ours = conversations(kind, shape, CODECS, inner=inner)[0]
    if kind in GROWS:
        size = (1, shape.kv_heads, length - 64, shape.head_dim)
        ours.state = ((torch.randn(size), torch.randn(size)),)
    if kind == "slices":
        ours.filled = length - 64
    for _ in range(3):
        ours.feed(tokens(1, shape))
    assert all(isinstance(held, tqcompile.CompressedKV) for held in ours.caches())
    return ours


@KINDS
def test_adoption_frees_the_memory_of_every_dense_cache(kind):
    shape = Shape(length=96)
    ours = conversations(kind, shape, CODECS)[0]
    ours.feed(tokens(60, shape), eager=True)
    held = [StorageWeakRef(dense.untyped_storage()) for dense in ours.caches()]
    assert len(held) == 4 and not any(storage.expired() for storage in held)
    ours.feed(tokens(1, shape))
    assert all(storage.expired() for storage in held)
    assert all(isinstance(compressed, tqcompile.CompressedKV) for compressed in ours.caches())


@pytest.mark.parametrize("eager", [False, True], ids=["compiled prefill", "eager prefill"])
@KINDS
def test_between_calls_nothing_as_large_as_a_dense_cache_is_alive(kind, eager):
    shape = Shape(length=160)
    # What other tests left, and tables that are kept for the process, is no cache of this one.
    known = live_tensors(0)
    others = set(map(id, known))
    ours = conversations(kind, shape, CODECS)[0]
    for at, call in enumerate([120, 1, 2]):
        dense_prefill = eager and at == 0
        ours.feed(tokens(call, shape), eager=dense_prefill)
        # The codes of a cache take less than half of it, spare room included.
        held = ours.caches()
        found = [t.shape for t in live_tensors(dense_bytes(held[0])) if id(t) not in others]
        assert (len(found) >= len(held)) if dense_prefill else not found, found
        assert dense_prefill or max(compressed.nbytes for compressed in held) < dense_bytes(held[0]) / 2


@KINDS
def test_no_corner_of_the_process_keeps_a_dense_cache(kind):
    """Counted where memory is handed out, so that what C++ holds is seen too."""
    shape = Shape(length=1024)
    kept = []

    def talk():
        kept.append(conversations(kind, shape, CODECS)[0])
        for count in (900, 1, 1, 2):
            kept[0].feed(tokens(count, shape))
        gc.collect()

    left = traffic(talk).left
    model, held = kept[0].model, kept[0].caches()
    small = sum(dense_bytes(t) for t in (*model.parameters(), *model.buffers()) if t not in set(held))
    assert left - small - tqcompile.report(model).compressed_bytes < dense_bytes(held[0]) / 4


@pytest.mark.parametrize("eager", [False, True], ids=["compiled prefill", "eager prefill"])
def test_an_outgrown_cache_dies_without_waiting_for_the_garbage_collector(eager):
    shape = Shape(length=64)
    ours = conversations("tuples", shape, CODECS)[0]
    gc.collect()
    gc.disable()
    try:
        ours.feed(tokens(40, shape), eager=eager)
        for _ in range(3):
            held = [weakref.ref(past) for past in ours.caches()]
            ours.feed(tokens(1, shape))
            assert not any(past() is not None for past in held)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "kind, inner",
    [*((kind, "eager") for kind in MODELS), ("tuples", "inductor"), ("counter", "inductor")],
)
def test_a_step_decodes_blocks_and_never_a_cache(kind, inner):
    peaks = []
    for length in (4096, 8192):
        torch._dynamo.reset()
        ours = filled(kind, length, inner)
        seen = step_traffic(ours)
        dense = dense_bytes(ours.caches()[0])
        assert seen.largest <= BLOCK < dense / 4
        assert seen.peak < dense if length == 4096 else seen.peak < dense / 2
        peaks.append(seen.peak)
    # Scores and masks grow with the length: a few numbers a token and head, where a token has head_dim of them.
    assert peaks[1] - peaks[0] < dense_bytes(ours.caches()[0]) / 2 / 16


@KINDS
def test_a_step_outside_of_attention_does_not_depend_on_the_length(kind):
    seen = []
    for length in (1024, 4096):
        torch._dynamo.reset()
        ours = filled(kind, length)
        seen.append(step_traffic(ours))
    short, long = seen
    assert short.operators == long.operators
    planes = code_bytes(ours.caches()[0]) / ours.caches()[0].shape[2 if kind != "slices" else 1]
    # Masks, and scores where the model itself computes their softmax; a copy of one plane would be more.
    assert sum(long.outside) - sum(short.outside) < planes * (4096 - 1024)


def test_an_append_allocates_the_same_at_every_length():
    extra = []
    for length in (1024, 4096):
        torch._dynamo.reset()
        ours = filled("tuples", length)
        seen = step_traffic(ours)
        length = ours.caches()[0].shape[2]
        token = torch.arange(length)
        mask = traffic(lambda token=token: rewrite.reach(token.clone() <= token[-1:].unsqueeze(-1)))
        extra.append(sum(seen.outside) - sum(mask.outside))
    assert extra[0] == extra[1]


@pytest.mark.parametrize("length", [64, 640, 4096])
def test_appends_copy_the_planes_once_in_a_sixteenth_of_their_length(length, monkeypatch):
    grown, make = [], cache.Buffer.__init__

    def counted(self, *args):
        make(self, *args)
        grown.append(self.capacity)

    ours = filled("tuples", length, heads=2, kv_heads=1, head_dim=32)
    monkeypatch.setattr(cache.Buffer, "__init__", counted)
    steps, start = 200, ours.caches()[0].shape[2]
    copies = []
    for _ in range(steps):
        before = [plane.data_ptr() for held in ours.caches() for plane in held.planes]
        grown.clear()
        ours.feed(tokens(1, ours.model.shape))
        after = [plane.data_ptr() for held in ours.caches() for plane in held.planes]
        assert (before == after) == (not grown)
        copies.append(len(grown) / 2)
    assert sum(copies) <= math.ceil(steps / max(32, start // 16))
    for held in ours.caches():
        assert held.nbytes <= code_bytes(held) * (1 + 1 / 16) + code_bytes(held) / held.shape[2] * 33


@pytest.mark.parametrize(
    "kind, inner", [*((kind, "eager") for kind in MODELS), ("tuples", "inductor"), ("made", "inductor")]
)
def test_a_cache_takes_the_bytes_of_its_codes_and_the_spare_room_it_grows_into(kind, inner):
    shape = Shape(length=200, layers=1)
    ours = conversations(kind, shape, CODECS, inner=inner)[0]
    for count in (150, 1, 1):
        ours.feed(tokens(count, shape))
        for held in ours.caches():
            each = code_bytes(held) // held.shape[1 if kind == "slices" else 2]
            spare = held.nbytes - code_bytes(held)
            # What a compiled prefill hands out is of its own length; the first append makes the room.
            assert spare == 0 if kind not in GROWS or count == 150 else 0 < spare <= 33 * each
        report = tqcompile.report(ours.model)
        assert report.compressed_bytes == sum(held.nbytes for held in ours.caches())
        assert report.dense_bytes == sum(map(dense_bytes, ours.caches()))
