"""The semantic operators a rewritten graph is made of: their schemas, shapes, and the provider for each device.

Each has one meaning, the plain PyTorch of `reference`. A CUDA tensor goes to a generated Triton kernel where one
exists, and everything else to the reference, blockwise, with its row decoder compiled.
"""

from collections.abc import Callable, Sequence

import torch

from tqcompile import formats, reference
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

_compile_rows: Callable | None = None
_row_functions: dict[tuple, Callable] = {}


def use_row_compiler(compile_rows: Callable | None) -> None:
    """Install the compiler of row codecs: `compile_rows(function, example rows) -> function`. None: run eagerly."""
    global _compile_rows
    _compile_rows = compile_rows


def decode_rows(codec: Codec, planes: Tensors, head_dim: int) -> torch.Tensor:
    """`reference.decode` of planes [..., width], folded into rows and compiled once a codec and head_dim."""
    if _compile_rows is None or codec.fit == "exact" or planes[0].shape[:-1].numel() < 2:
        return reference.decode(codec, planes, head_dim)
    # Rows in the order they lie in memory: whatever the model's order of dimensions is, nothing is copied.
    order = sorted(range(planes[0].dim() - 1), key=planes[0].stride, reverse=True)
    ordered = [plane.permute(*order, -1) for plane in planes]
    leading = ordered[0].shape[:-1]
    rows = [plane.reshape(-1, plane.shape[-1]).contiguous() for plane in ordered]
    # A float16 operand makes Inductor work on two vectors at a time, as arrays: several times slower.
    rows = [plane.float() if plane.is_floating_point() else plane for plane in rows]
    key = ("decode", codec.name, head_dim, rows[0].device)
    if key not in _row_functions:
        _row_functions[key] = _compile_rows(lambda *planes: (reference.decode(codec, planes, head_dim),), rows)
    back = sorted(range(len(order)), key=order.__getitem__)
    return _row_functions[key](*rows)[0].view(*leading, head_dim).permute(*back, -1)


def encode_rows(codec: Codec, y: torch.Tensor) -> Tensors:
    """`reference.encode` of y [..., head_dim], folded into rows and compiled once a codec, head_dim and dtype."""
    if _compile_rows is None or codec.fit == "exact" or y.shape[:-1].numel() < 2:
        return reference.encode(codec, y)
    rows = y.reshape(-1, y.shape[-1]).contiguous()
    key = ("encode", codec.name, rows.shape[-1], rows.device, rows.dtype)
    if key not in _row_functions:
        _row_functions[key] = _compile_rows(lambda row: reference.encode(codec, row), [rows])
    return [plane.view(*y.shape[:-1], plane.shape[-1]) for plane in _row_functions[key](rows)]


def prepare(codec: Codec, head_dim: int, device: torch.device) -> None:
    """Make what the operators keep for a codec on `device`, so that none of it is made during a step."""
    if device.type == "cuda":
        from tqcompile.kernels import append as kernel

        kernel.prepare(codec, head_dim, device)


def _append_reference(planes: Tensors, y: torch.Tensor, positions: torch.Tensor | None, codec: str) -> None:
    reference.append(formats.codec(codec), planes, y, positions, encode_rows)


def _append_cuda(planes: Tensors, y: torch.Tensor, positions: torch.Tensor | None, codec: str) -> None:
    from tqcompile.kernels import append as kernel

    kernel.append(formats.codec(codec), planes, y, positions)


def _attend_reference(q, keys, values, mask, causal, scale, key_codec, value_codec, key_dim, value_dim):
    codecs = formats.codec(key_codec), formats.codec(value_codec)
    out = reference.attend(q, keys, values, mask, causal, scale, *codecs, (key_dim, value_dim), decode_rows)
    return out.contiguous()


def _attend_cuda(q, keys, values, mask, causal, scale, key_codec, value_codec, key_dim, value_dim):
    from tqcompile.kernels import attend as kernel

    codecs = formats.codec(key_codec), formats.codec(value_codec)
    return kernel.attend(q, keys, values, mask, causal, scale, *codecs, (key_dim, value_dim)).contiguous()


def _logits(q: torch.Tensor, keys: Tensors, codec: str, head_dim: int) -> torch.Tensor:
    return reference.logits(q, keys, formats.codec(codec), head_dim, decode_rows)


def _mix(weights: torch.Tensor, values: Tensors, codec: str, head_dim: int) -> torch.Tensor:
    return reference.mix(weights, values, formats.codec(codec), head_dim, decode_rows)


_library.impl("append", _append_reference, "CPU")
_library.impl("append", _append_cuda, "CUDA")
_library.impl("attend", _attend_reference, "CPU")
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
