"""The semantic operators a rewritten graph is made of: their schemas, shapes, and the provider for each device.

Each has one meaning, the plain PyTorch of `reference`. A CUDA tensor goes to a generated Triton kernel where one
exists; everything else goes to `cpu`, which is the reference with parts of it compiled.
"""

from collections.abc import Sequence

import torch

from tqcompile import cpu, formats, reference
from tqcompile.codec import Codec

Tensors = Sequence[torch.Tensor]

_library = torch.library.Library("tqcompile", "DEF")
_library.define("append(Tensor(a!)[] planes, Tensor y, Tensor? positions, str codec) -> ()")
_library.define(
    "attend(Tensor q, Tensor[] keys, Tensor[] values, Tensor? mask, bool causal, float scale, "
    "str key_codec, str value_codec, int key_dim, int value_dim) -> Tensor"
)
_library.define("logits(Tensor q, Tensor[] keys, str codec, int head_dim) -> Tensor")
_library.define("mix(Tensor weights, Tensor[] values, str codec, int head_dim) -> Tensor")

append = torch.ops.tqcompile.append.default
attend = torch.ops.tqcompile.attend.default
logits = torch.ops.tqcompile.logits.default
mix = torch.ops.tqcompile.mix.default


def prepare(codec: Codec, head_dim: int, device: torch.device) -> None:
    """Make what the operators keep for a codec on `device`, so that none of it is made during a step."""
    if device.type == "cuda":
        from tqcompile.kernels import append as kernel
        from tqcompile.kernels import integer

        kernel.prepare(codec, head_dim, device)
        integer.prepare(codec, head_dim, device)


def _append_cpu(planes: Tensors, y: torch.Tensor, positions: torch.Tensor | None, codec: str) -> None:
    reference.append(formats.codec(codec), planes, y, positions, cpu.encode_rows)


def _append_cuda(planes: Tensors, y: torch.Tensor, positions: torch.Tensor | None, codec: str) -> None:
    from tqcompile.kernels import append as kernel

    with torch.cuda.device(y.device):
        kernel.append(formats.codec(codec), planes, y, positions)


def _attend_cpu(q, keys, values, mask, causal, scale, key_codec, value_codec, key_dim, value_dim):
    codecs = formats.codec(key_codec), formats.codec(value_codec)
    return cpu.attend(q, keys, values, mask, causal, scale, *codecs, (key_dim, value_dim)).contiguous()


def _attend_cuda(q, keys, values, mask, causal, scale, key_codec, value_codec, key_dim, value_dim):
    from tqcompile.kernels import attend as kernel

    codecs = formats.codec(key_codec), formats.codec(value_codec)
    with torch.cuda.device(q.device):
        return kernel.attend(q, keys, values, mask, causal, scale, *codecs, (key_dim, value_dim)).contiguous()


def _logits(q: torch.Tensor, keys: Tensors, codec: str, head_dim: int) -> torch.Tensor:
    return cpu.logits(q, keys, formats.codec(codec), head_dim)


def _mix(weights: torch.Tensor, values: Tensors, codec: str, head_dim: int) -> torch.Tensor:
    return cpu.mix(weights, values, formats.codec(codec), head_dim)


_library.impl("append", _append_cpu, "CPU")
_library.impl("append", _append_cuda, "CUDA")
_library.impl("attend", _attend_cpu, "CPU")
_library.impl("attend", _attend_cuda, "CUDA")
for _device in ("CPU", "CUDA"):
    _library.impl("logits", _logits, _device)
    _library.impl("mix", _mix, _device)


@torch.library.register_fake("tqcompile::append", lib=_library)
def _(planes, y, positions, codec):
    return None


@torch.library.register_fake("tqcompile::attend", lib=_library)
def _(q, keys, values, mask, causal, scale, key_codec, value_codec, key_dim, value_dim):
    return q.new_empty((*q.shape[:-1], value_dim), dtype=torch.float32)


@torch.library.register_fake("tqcompile::logits", lib=_library)
def _(q, keys, codec, head_dim):
    return q.new_empty((*q.shape[:-1], keys[0].shape[2]), dtype=torch.float32)


@torch.library.register_fake("tqcompile::mix", lib=_library)
def _(weights, values, codec, head_dim):
    return weights.new_empty((*weights.shape[:-1], head_dim), dtype=torch.float32)
