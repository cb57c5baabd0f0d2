"""The conversation that a test holds with a model, and the dense twin of a compressed one.

`Conversation` drives a model through calls of any length, compiled or not; with `store` it is the reference twin of a
compressed model: a dense cache that holds decoded codes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from models import MODELS, Buffers, Made, Model, Shape, Slices, Tuples, unchanged

from tqcompile import coding, formats, reference, tables


def fake_quantised(x: torch.Tensor, codec: str) -> torch.Tensor:
    """`x` [..., head_dim] as a cache of that codec gives it back."""
    format = formats.codec(codec)
    # A GPU rotates what is in half precision by a basis of that precision: a number near an edge is told apart.
    dtype = x.dtype if x.is_cuda else torch.float32
    basis = tables.basis_matrix(format, x.shape[-1], x.device, dtype)
    basis = None if basis is None else basis.float()
    planes = coding.encode(format, reference.rotate(x, basis))
    return reference.rotate_back(coding.decode(format, planes, x.shape[-1]), basis, x.dtype)


@dataclass
class Conversation:
    """Calls of a model, one after the other, on one cache.

    With `codecs` (keys, values) the model is the twin of a compressed one: what it stores is quantised and decoded.
    """

    model: Model
    call: Callable | None = None
    codecs: tuple[str, str] | None = None
    filled: int = 0
    state: object = None
    twin: dict = field(default_factory=dict)

    def __post_init__(self):
        self.call = self.model if self.call is None else self.call
        self._store(exact=False)

    def _store(self, exact: bool) -> None:
        if self.codecs is not None:
            store = unchanged if exact else lambda k, v: tuple(map(fake_quantised, (k, v), self.codecs))
            for block in self.model.blocks:
                block.store = store

    @torch.no_grad()
    def feed(self, x: torch.Tensor, exact: bool = False, eager: bool = False) -> torch.Tensor:
        """The model's output for x [B, T, EMBED].

        `exact`: the twin of a call that attends over its own unquantised tokens and encodes them afterwards.
        """
        call, tokens = self.model if eager else self.call, x.shape[1]
        self._store(exact)
        positions = torch.arange(self.filled, self.filled + tokens, device=x.device)
        if isinstance(self.model, Tuples):
            out, self.state = call(x, self.state)
        elif isinstance(self.model, Made):
            out, self.state = call(x, self.state, positions)
        elif isinstance(self.model, Buffers):
            out = call(x, positions)
        elif isinstance(self.model, Slices):
            out = call(x, self.filled)
        else:
            out = call(x)
        if exact and self.codecs is not None:
            self._quantise()
        self.filled += tokens
        return out

    def _quantise(self) -> None:
        if self.state is not None:
            self.state = tuple(tuple(map(fake_quantised, kv, self.codecs)) for kv in self.state)
        else:
            for tensor, codec in zip(self.caches(), self.codecs * self.model.shape.layers):
                tensor.copy_(fake_quantised(tensor, codec))

    def again(self) -> None:
        """Start another conversation in the same cache, without clearing it."""
        self.filled, self.state = 0, None
        for block in self.model.blocks:
            if hasattr(block, "filled"):
                block.filled.zero_()

    def reset(self) -> None:
        """Clear the cache and start again."""
        if not isinstance(self.model, (Tuples, Made)):
            for tensor in self.caches():
                tensor.zero_()
        self.again()

    def caches(self) -> list[torch.Tensor]:
        """The live caches, keys and values in turn."""
        if self.state is not None:
            return [tensor for kv in self.state for tensor in kv]
        if isinstance(self.model, Slices):
            return [tensor for block in self.model.blocks for tensor in (block.cache_k, block.cache_v)]
        if isinstance(self.model, (Tuples, Made)):
            return []
        return [tensor for block in self.model.blocks for tensor in (block.k_cache, block.v_cache)]


def conversations(
    kind: str, shape: Shape, codecs: tuple[str, str], seed: int = 0, **options
) -> tuple[Conversation, Conversation]:
    """A compiled model with a compressed cache, and the twin it has to agree with."""
    torch.manual_seed(seed)
    model, twin = MODELS[kind](shape), MODELS[kind](shape)
    twin.load_state_dict(model.state_dict())
    model.requires_grad_(False), twin.requires_grad_(False)
    options = {"keys": codecs[0], "values": codecs[1], "inner": "eager", **options}
    compiled = torch.compile(model, backend="turboquant", options=options)
    return Conversation(model, compiled), Conversation(twin, codecs=codecs)
