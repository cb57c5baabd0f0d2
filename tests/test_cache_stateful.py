"""Any order of operations on compressed caches, against dense twins that hold the decoded codes."""

import copy
import gc
import pickle
import re
import sys
import weakref
from dataclasses import dataclass, field

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tqcompile import CompressedKV, coding, formats, ops, reference, tables
from tqcompile.cache import storages

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUMBER = st.integers(0, 10**6)


def codes(cache):
    """A cache's numbers in the codec's basis, where every move is exact."""
    return coding.decode(cache.codec, cache.planes, cache.shape[-1])


@dataclass
class Buffer:
    """What the caches in one buffer have in common: once one was continued in place, none may be written."""

    continued: bool = False


@dataclass
class Entry:
    """A cache and its twin: views of the one are views of the other."""

    cache: CompressedKV
    twin: torch.Tensor
    buffer: Buffer = field(default_factory=Buffer)


class Caches(RuleBasedStateMachine):
    """Caches of one codec and head_dim."""

    def __init__(self):
        super().__init__()
        self.entries: list[Entry] = []

    @initialize(
        codec=st.sampled_from(("identity", "q8_0", "turboquant:2", "turboquant:5", "turboquant:2.5", "polarquant")),
        head_dim=st.sampled_from((32, 33, 48, 80, 96)),
        dtype=st.sampled_from(DTYPES),
        size=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 4)),
        seed=NUMBER,
    )
    def start(self, codec, head_dim, dtype, size, seed):
        self.codec, self.head_dim = formats.codec(codec), head_dim
        self.generator = torch.Generator().manual_seed(seed)
        dense = self.tokens(size, dtype)
        self.put(CompressedKV.encode(dense, self.codec), self.stored(dense))

    # What the twin is made of.

    def tokens(self, size, dtype):
        return torch.randn(*size, self.head_dim, generator=self.generator).to(dtype)

    def stored(self, dense):
        """What a cache makes of tokens; computed by the reference, not by the cache."""
        if dense.numel() == 0:
            return dense if self.codec.is_exact else dense.float()
        basis = tables.basis_matrix(self.codec, self.head_dim)
        return coding.decode(
            self.codec, coding.encode(self.codec, reference.rotate(dense, basis)), self.head_dim
        ).clone()

    def put(self, cache, twin, buffer=None):
        self.entries.append(Entry(cache, twin, buffer or Buffer()))
        del self.entries[: len(self.entries) - 6]

    def pick(self, which):
        # The newest twice as often: what goes wrong takes a few operations on one cache.
        return self.entries[-1 if which % 2 else which // 2 % len(self.entries)]

    def axis(self, entry, which):
        return which % (entry.twin.dim() - 1)

    def copied(self, cache, twin):
        self.put(cache, twin.clone(memory_format=torch.contiguous_format))

    # Growing.

    @rule(which=NUMBER, axis=st.sampled_from((0, 1, 2, 2, 2)), tokens=st.integers(0, 3))
    def append(self, which, axis, tokens):
        entry = self.pick(which)
        axis = self.axis(entry, axis)
        size = [tokens if dim == axis else extent for dim, extent in enumerate(entry.twin.shape[:-1])]
        more = self.tokens(size, entry.cache.dtype)
        self.continue_with(
            entry, torch.cat([entry.cache, more], axis), torch.cat([entry.twin, self.stored(more)], axis)
        )

    @rule(which=NUMBER, tokens=st.integers(1, 3))
    def append_as_a_graph_does(self, which, tokens):
        entry = self.pick(which)
        if entry.twin.dim() != 4 or entry.twin.numel() == 0:
            return
        length = entry.twin.shape[2]
        more = self.tokens((*entry.twin.shape[:2], tokens), entry.cache.dtype)
        cache, basis = entry.cache.room(tokens, 2), tables.basis_matrix(self.codec, self.head_dim)
        places = torch.arange(length, length + tokens)
        ops.append(cache.planes, more, places, basis, self.codec.name)
        self.continue_with(entry, cache, torch.cat([entry.twin, self.stored(more)], 2))

    @rule(which=NUMBER, tokens=st.integers(1, 2))
    def fork(self, which, tokens):
        """Two continuations of the newest tokens, one after the other."""
        self.append(which, 2, tokens)
        newest = len(self.entries) - 1
        self.append(newest, 2, tokens)
        self.append(len(self.entries) - 2, 2, tokens)

    def continue_with(self, entry, cache, twin):
        in_place = cache.buffer is entry.cache.buffer
        if in_place:
            entry.buffer.continued = True
        self.put(cache, twin.contiguous(), entry.buffer if in_place else None)

    @rule(which=NUMBER, times=st.integers(1, 3), axis=NUMBER)
    def join(self, which, times, axis):
        entry = self.pick(which)
        axis = self.axis(entry, axis)
        self.copied(torch.cat([entry.cache] * times, axis), torch.cat([entry.twin] * times, axis))

    # Writing.

    def write(self, entry, change, *arguments):
        """`change` the cache and its twin, or see the cache refuse and stay as it is."""
        try:
            change(entry.cache, arguments[0] if arguments else None)
        except RuntimeError as error:
            # Once continued, a cache may be written again when its kin is gone; the twins tell if that came too early.
            assert entry.buffer.continued or entry.cache.copied
            assert re.search(r"another continues or shows|tokens do not lie so", str(error))
        else:
            assert not entry.cache.copied
            change(entry.twin, self.stored(arguments[0]).to(entry.twin.dtype) if arguments else None)

    @rule(which=NUMBER, axis=NUMBER, places=st.lists(NUMBER, min_size=1, max_size=3), how=st.integers(0, 3))
    def write_at(self, which, axis, places, how):
        entry = self.pick(which)
        axis = self.axis(entry, axis)
        length = entry.twin.shape[axis]
        if length == 0:
            return
        at = torch.tensor(sorted({place % length for place in places}))
        first, count = int(at[0]), min(len(at), length - int(at[0]))
        tokens = len(at) if how < 2 else count
        size = [tokens if dim == axis else extent for dim, extent in enumerate(entry.twin.shape[:-1])]
        value = self.tokens(size, entry.cache.dtype)
        everything = (slice(None),) * axis
        change = (
            lambda x, v: x.index_copy_(axis, at, v),
            lambda x, v: x.__setitem__((*everything, at), v),
            lambda x, v: x.narrow(axis, first, count).copy_(v),
            lambda x, v: x.__setitem__((*everything, slice(first, first + count)), v),
        )[how]
        self.write(entry, change, value)

    @rule(which=NUMBER)
    def overwrite(self, which):
        entry = self.pick(which)
        self.write(entry, lambda x, v: x.copy_(v), self.tokens(entry.twin.shape[:-1], entry.cache.dtype))

    @rule(which=NUMBER)
    def zero(self, which):
        self.write(self.pick(which), lambda x, v: x.zero_())

    @rule(which=NUMBER, source=NUMBER)
    def copy_codes(self, which, source):
        entry, other = self.pick(which), self.pick(source)
        fits = entry.twin.shape == other.twin.shape and entry.cache.dtype == other.cache.dtype
        if not fits or storages(entry.cache).keys() & storages(other.cache).keys():
            return
        if not (entry.buffer.continued or entry.cache.copied):
            entry.cache.copy_(other.cache)
            entry.twin.copy_(other.twin)

    # Views.

    @rule(which=NUMBER, axis=NUMBER, start=NUMBER, stop=NUMBER, step=st.sampled_from((1, 1, 1, 2)))
    def crop(self, which, axis, start, stop, step):
        entry = self.pick(which)
        axis = self.axis(entry, axis)
        length = entry.twin.shape[axis] + 1
        index = (*(slice(None),) * axis, slice(start % length, stop % length, step))
        self.put(entry.cache[index], entry.twin[index], entry.buffer)

    @rule(which=NUMBER, tokens=st.integers(1, 2))
    def take_back(self, which, tokens):
        entry = self.pick(which)
        axis = entry.twin.dim() - 2
        keep = max(0, entry.twin.shape[axis] - tokens)
        self.put(entry.cache.narrow(axis, 0, keep), entry.twin.narrow(axis, 0, keep), entry.buffer)

    @rule(which=NUMBER, first=NUMBER, second=NUMBER)
    def transpose(self, which, first, second):
        entry = self.pick(which)
        first, second = self.axis(entry, first), self.axis(entry, second)
        self.put(entry.cache.transpose(first, second), entry.twin.transpose(first, second), entry.buffer)

    @rule(which=NUMBER, axis=NUMBER)
    def unsqueeze(self, which, axis):
        entry = self.pick(which)
        if entry.twin.dim() < 5:
            axis = self.axis(entry, axis)
            self.put(entry.cache.unsqueeze(axis), entry.twin.unsqueeze(axis), entry.buffer)

    @rule(which=NUMBER, axis=NUMBER)
    def flatten(self, which, axis):
        entry = self.pick(which)
        if entry.twin.dim() < 4:
            return
        axis = axis % (entry.twin.dim() - 2)
        cache, twin = entry.cache.flatten(axis, axis + 1), entry.twin.flatten(axis, axis + 1)
        if cache.copied:
            entry.buffer.continued = True
        viewed = twin._base is not None and twin.untyped_storage()._cdata == entry.twin.untyped_storage()._cdata
        self.put(cache, twin, entry.buffer if viewed else None)

    NEWEST = 1

    @rule(which=NUMBER, back=st.integers(1, 2), tokens=st.integers(1, 2), again=st.booleans())
    def retract_and_go_on(self, which, back, tokens, again):
        """What speculative decoding does: the last tokens are wrong, and others follow."""
        self.append(which, 2, tokens)
        self.take_back(self.NEWEST, back)
        self.append(self.NEWEST, 2, tokens)
        if again:
            self.append(self.NEWEST, 2, tokens)

    @rule(which=NUMBER, axis=NUMBER)
    def flatten_and_write(self, which, axis):
        """A view of dense memory that a buffer cannot give: what is written must not vanish."""
        self.append(which, 2, 1)
        self.flatten(self.NEWEST, axis)
        self.unsqueeze(self.NEWEST, axis)
        self.overwrite(self.NEWEST)

    # Copies.

    @rule(which=NUMBER, axis=NUMBER, places=st.lists(NUMBER, max_size=3))
    def reorder(self, which, axis, places):
        entry = self.pick(which)
        axis = self.axis(entry, axis)
        length = entry.twin.shape[axis]
        at = torch.tensor([place % length for place in places] if length else [], dtype=torch.int64)
        self.copied(entry.cache.index_select(axis, at), entry.twin.index_select(axis, at))

    @rule(which=NUMBER, axis=NUMBER, times=st.integers(1, 2))
    def repeat_interleave(self, which, axis, times):
        entry = self.pick(which)
        axis = self.axis(entry, axis)
        if entry.twin.numel() < 20_000:
            self.copied(*(x.repeat_interleave(times, axis) for x in (entry.cache, entry.twin)))

    @rule(which=NUMBER, axis=NUMBER, by=st.integers(-2, 2))
    def roll(self, which, axis, by):
        entry = self.pick(which)
        axis = self.axis(entry, axis)
        self.copied(*(x.roll(by, axis).flip(axis) for x in (entry.cache, entry.twin)))

    @rule(which=NUMBER, how=st.sampled_from(("clone", "deepcopy", "pickle", "contiguous")))
    def copy(self, which, how):
        entry = self.pick(which)
        if how == "contiguous" and entry.twin.is_contiguous():
            assert entry.cache.contiguous() is entry.cache
            return
        make = {
            "clone": lambda x: x.clone(),
            "deepcopy": copy.deepcopy,
            "pickle": lambda x: pickle.loads(pickle.dumps(x)),
            "contiguous": lambda x: x.contiguous(),
        }[how]
        self.copied(make(entry.cache), entry.twin)

    @rule(which=NUMBER, dtype=st.sampled_from(DTYPES))
    def cast(self, which, dtype):
        entry = self.pick(which)
        if dtype == entry.cache.dtype:
            assert entry.cache.to(dtype) is entry.cache
            return
        self.copied(entry.cache.to(dtype), entry.twin.to(dtype) if self.codec.is_exact else entry.twin)

    @precondition(lambda self: len(self.entries) > 1)
    @rule(which=NUMBER)
    def drop(self, which):
        self.entries.pop(which % len(self.entries))

    # What always holds.

    @invariant()
    def every_cache_is_its_twin(self):
        for entry in self.entries:
            cache, twin = entry.cache, entry.twin
            assert type(cache) is CompressedKV and cache.shape == twin.shape and cache.stride() == twin.stride()
            assert torch.equal(codes(cache), twin), (cache, entry)
            assert cache.nbytes == sum(storage.nbytes() for storage in storages(cache).values())

    @invariant()
    def the_newest_decodes_to_its_twin(self):
        if self.entries:
            cache, twin = self.entries[-1].cache, self.entries[-1].twin
            basis = tables.basis_matrix(self.codec, self.head_dim)
            dense = reference.rotate_back(twin.contiguous(), basis, cache.dtype)
            torch.testing.assert_close(
                cache.decode(), dense, rtol=0.01 if cache.dtype != torch.float32 else 0, atol=1e-5
            )

    def teardown(self):
        alive = [weakref.ref(plane) for entry in self.entries for plane in entry.cache.planes]
        alive += [weakref.ref(entry.cache.buffer) for entry in self.entries if entry.cache.buffer is not None]
        self.entries.clear()
        if any(ref() is not None for ref in alive):
            gc.collect()
        # A failure's own traceback holds the caches it is about.
        assert sys.exc_info()[0] is not None or not any(ref() is not None for ref in alive)


TestCaches = Caches.TestCase
TestCaches.settings = settings(max_examples=150, stateful_step_count=30)
