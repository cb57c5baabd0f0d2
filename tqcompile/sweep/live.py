"""What a model's cache object holds after a run: which tensors are compressed, which are dense, and their bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tqcompile.cache import CompressedKV, storages

# Tensors of a cache object that keep no keys and values of tokens: the states of a recurrence or a convolution.
_STATES = ("conv", "recurrent", "ssm", "state", "wkv", "linear")
_KEPT = ("keys", "values")


@dataclass(frozen=True)
class Held:
    """One tensor of a cache object: `kind` is `self`, `cross`, `state` or `other` (a counter, an index, ...)."""

    path: str
    kind: str
    compressed: bool
    shape: tuple[int, ...]
    bytes: int


def held(cache: Any) -> list[Held]:
    """Every tensor with numbers in it that `cache` holds: a cache object, or nested tuples of tensors."""
    found, seen = [], set()
    for path, tensor in _walk(cache, "", set()):
        if id(tensor) not in seen and tensor.numel():
            seen.add(id(tensor))
            size = sum(storage.nbytes() for storage in storages(tensor).values())
            found.append(Held(path, _kind(path, tensor), isinstance(tensor, CompressedKV), tuple(tensor.shape), size))
    return found


def summary(tensors: list[Held]) -> dict[str, dict]:
    """For each kind: how many are compressed of how many, their bytes, and the dense ones by name and shape."""
    found: dict[str, dict] = {}
    for item in tensors:
        row = found.setdefault(item.kind, {"compressed": 0, "count": 0, "bytes": 0, "dense": []})
        row["compressed"] += item.compressed
        row["count"] += 1
        row["bytes"] += item.bytes
        name = f"{_name(item.path)} {list(item.shape)}"
        if not item.compressed and name not in row["dense"]:
            row["dense"].append(name)
    return found


def _walk(value: Any, path: str, visited: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)) and not _is_config(value):
        items = vars(value).items()
    else:
        return
    for name, item in items:
        yield from _walk(item, f"{path}.{name}" if path else str(name), visited)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _name(path: str) -> str:
    """What a path says on its own: `keys`, `conv_states.0`."""
    rest, _, last = path.rpartition(".")
    return f"{rest.rpartition('.')[2]}.{last}" if last.isdigit() and rest else last


def _kind(path: str, tensor: torch.Tensor) -> str:
    name = path.rpartition(".")[2]
    if any(word in path for word in _STATES):
        return "state"
    if name in _KEPT or (tensor.dim() == 4 and name.isdigit()):
        return "cross" if "cross" in path else "self"
    return "other"
