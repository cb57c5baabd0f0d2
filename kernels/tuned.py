"""Settings of the kernels on int8 units that a search on this kind of device found best, kept on disk.

`search` times a table of settings and is called by a command alone; a launch asks `found`, which reads a file once a
process for each key, and gives None for what nobody searched: then the defaults of `tune` hold. A key names the content
of the kernel, the sizes (heads and tokens up to the next power of two), the device and the version of Triton, so that
anything that changed is not found.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
import triton

from tqcompile.kernels import emit
from tqcompile.kernels.address import power_of_two
from tqcompile.kernels.tune import AttendPlan, Setting, capability_of, integer_plan


@dataclass(frozen=True)
class Key:
    """What a setting was found for: a kernel, query rows a KV head, and up to how many KV heads in all, and tokens."""

    kernel: str
    rows: int
    heads: int
    length: int
    device: str
    capability: str
    triton: str

    @property
    def path(self) -> Path:
        """The file that holds its setting."""
        return emit.default_folder() / f"tuned_{digest(repr(self))}.json"


# Of this process: None where there is no file.
_found: dict[Key, Setting | None] = {}


@cache
def digest(text: str) -> str:
    """A short name for the content of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def device_of(device: torch.device) -> tuple[str, str]:
    """The name of a device, and its capability."""
    if device.type != "cuda":
        return device.type, ""
    return torch.cuda.get_device_name(device), "{}.{}".format(*capability_of(device))


def key_of(source: str, rows: int, heads: int, length: int, device: torch.device) -> Key:
    """The key of a launch of the kernel of `source` for `rows` query rows on each of `heads` KV heads."""
    return Key(digest(source), rows, power_of_two(heads), power_of_two(length), *device_of(device), triton.__version__)


def found(key: Key) -> Setting | None:
    """The setting that a search found for a key, or None."""
    if key not in _found:
        _found[key] = _read(key)
    return _found[key]


_caches: list = []


def kept(function: Callable) -> Callable:
    """`function`, whose results for the last arguments are kept until a search tries other settings."""
    _caches.append(lru_cache(maxsize=4096)(function))
    return _caches[-1]


def forget() -> None:
    """Keep no results of earlier settings."""
    for cached in _caches:
        cached.cache_clear()


@kept
def plan(choice: Callable, kernel, rows: int, heads: int, length: int, device: torch.device) -> AttendPlan:
    """The plan for `rows` query rows on each of `heads` KV heads; `choice` gives the key of a call and its default."""
    key, default = choice(kernel, rows, heads, length, device)
    return integer_plan(found(key) or default, rows, heads, length, device)


def _read(key: Key) -> Setting | None:
    path = key.path
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if content["key"] != asdict(key):
            raise ValueError(f"it is of another key, {content['key']}")
        return Setting(**content["setting"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"{path} is no setting that was found for this kernel, and is ignored: {error!r}", stacklevel=2)
        return None


def search(key: Key, settings: Iterable[Setting], milliseconds: Callable[[], float]) -> dict[Setting, float]:
    """Time each setting by `milliseconds()`, whose launches of this key use it, and keep the fastest for them."""
    times: dict[Setting, float] = {}
    try:
        for setting in settings:
            _found[key] = setting
            forget()
            times[setting] = milliseconds()
    finally:
        _found.pop(key, None)
        forget()
    best = min(times, key=times.__getitem__)
    _write(key, {"key": asdict(key), "setting": asdict(best), "milliseconds": times[best]})
    return times


def _write(key: Key, content: dict) -> None:
    """Put a file in its place at once: other processes may read it."""
    key.path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=key.path.parent, suffix=".tmp")
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=1)
    os.replace(temporary, key.path)
