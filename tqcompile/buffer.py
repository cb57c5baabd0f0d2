"""The storage that a functional cache grows in: an append writes behind the last token instead of copying them all."""

import weakref
from copy import copy

import torch

Planes = tuple[torch.Tensor, ...]


class Buffer:
    """Growing storage of one functional cache: planes [capacity, *others, width], the sequence outermost.

    With the sequence outermost a view's strides depend on neither length nor capacity, so a compiled step fits
    every length. An append leaves the older cache's tokens where they are, so a write would change both for as long
    as both live; beside a copy that stands for a view it would change one only.
    """

    def __init__(self, planes: Planes, seq_dim: int, room: int):
        length = planes[0].shape[seq_dim]
        # A sixteenth of slack bounds both the bytes that idle and the copies a growing cache makes.
        self.capacity = length + room + max(32, length // 16)
        self.seq_dim = seq_dim
        self.used = length
        self._marks: dict[str, object] = {}
        self._holders: list[weakref.ref] = []
        with torch.inference_mode(False):
            self.storage = tuple(self._allocate(plane) for plane in planes)
        self._runs = [(plane, *_run_of(plane, seq_dim, length), plane.stride(0)) for plane in self.storage]
        for target, plane in zip(self.view(0, length), planes):
            target.copy_(plane)

    def _allocate(self, plane: torch.Tensor) -> torch.Tensor:
        others = [size for dim, size in enumerate(plane.shape) if dim != self.seq_dim]
        return plane.new_empty((self.capacity, *others))

    def view(self, start: int, stop: int) -> Planes:
        """Tokens start..stop, in the cache's own order of dimensions."""
        views = []
        for plane, size, stride, step in self._runs:
            size = (*size[: self.seq_dim], stop - start, *size[self.seq_dim + 1 :])
            views.append(plane.as_strided(size, stride, start * step))
        return tuple(views)

    def fits(self, used: int, tokens: int, seq_dim: int) -> bool:
        """Whether so many `tokens` along `seq_dim` have room behind the first `used`, which are all that it holds."""
        return self.seq_dim == seq_dim and self.used == used and used + tokens <= self.capacity

    def hold(self, cache: torch.Tensor) -> None:
        """Count a cache that shows tokens of this storage, or a copy of them; true views of it need no count."""
        self._holders = [holder for holder in self._holders if holder() is not None] + [weakref.ref(cache)]

    @property
    def shared(self) -> bool:
        """Whether more than one cache that is still alive was made of this storage."""
        return sum(holder() is not None for holder in self._holders) > 1

    def forget_length(self, cache: torch.Tensor) -> None:
        """Ask Dynamo to compile the next step for any length of a cache that shows tokens of this storage."""
        if not self._marks:
            # Every step has a cache of its own, and marking is slow: what it leaves is the same for all.
            before = set(vars(cache))
            torch._dynamo.maybe_mark_dynamic(cache, self.seq_dim)
            self._marks = {name: vars(cache)[name] for name in set(vars(cache)) - before}
        vars(cache).update({name: copy(mark) for name, mark in self._marks.items()})

    def place(self, plane: torch.Tensor) -> int:
        """The first token of a view of the first plane, or -1 where it is no whole run of tokens."""
        whole = self.storage[0]
        if plane.dim() != whole.dim() or plane.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            return -1
        start, within = divmod(plane.storage_offset(), whole.stride(0))
        run = _run_of(whole, self.seq_dim, plane.shape[self.seq_dim])
        return start if not within and run == (list(plane.shape), list(plane.stride())) else -1


def _run_of(storage: torch.Tensor, seq_dim: int, tokens: int) -> tuple[list[int], list[int]]:
    """Sizes and strides of a run of tokens in the cache's own order of dimensions."""
    size, stride = list(storage.shape[1:]), list(storage.stride()[1:])
    size.insert(seq_dim, tokens)
    stride.insert(seq_dim, storage.stride(0))
    return size, stride
