"""Every option of the backend on one page. The only reader of the environment."""

import difflib
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqcompile import formats
from tqcompile.codec import Codec
from tqcompile.formats import Preset

ENVIRONMENT = "TQCOMPILE_OPTIONS"
PASSES = ("flex", "canonicalize", "absorb", "sites", "centre", "regions", "compress", "second", "fuse")
# What a preset has beside codecs.
EXTRAS = ("sinks", "window", "centre")
INNERS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """What the backend may do. Given as `torch.compile(..., options={...})`, `tqcompile.turboquant(...)` or the
    environment variable TQCOMPILE_OPTIONS ("keys=turboquant:4,values=q8_0"), the later ones as defaults.
    """

    preset: str = formats.DEFAULT
    """How both caches are kept, by name. Where `keys` or `values` is given it takes the place of the preset's, and what
    the preset keeps exactly or centres is left out: a preset was measured as a whole.
    """

    keys: str | None = None
    """Codec of the key cache, such as "turboquant:4" or "q8_0"."""

    values: str | None = None
    """Codec of the value cache; some codecs serve keys alone."""

    sinks: int | None = None
    """How many of the first tokens of each cache are kept as they are, too; None for what the preset says."""

    window: int | None = None
    """How many of its last tokens are: in the cache's own dtype, beside the codes of all tokens."""

    strict: bool = False
    """Raise where a cache cannot be compressed, instead of leaving it dense and saying so in the report.

    What a graph stores tokens in and reads counts as a cache, known to a pattern or not.
    """

    centre: bool | None = None
    """Take off keys, before they are encoded, the mean that they have before they are rotated by their positions, and
    divide what is left by the balance of their channels with those of queries.

    Attention adds what the mean contributes to the scores, and multiplies queries by the balance. Both come from a
    cache's first tokens, the mean also from weights.
    """

    disable: tuple[str, ...] = ()
    """Passes to leave out, by name."""

    inner: str = "inductor"
    """The compiler that gets the rewritten graph: inductor, aot_eager or eager."""

    dump: Path | None = None
    """Folder that receives, for each graph with a cache, the graph before and after the passes, the source that
    Inductor generated for the rewritten one, and on CUDA the Triton modules of its caches and readers.
    """

    def __post_init__(self):
        _one_of("preset", self.preset, tuple(formats.PRESETS))
        for name, allowed in (("keys", tuple(formats.REGISTRY)), ("values", formats.FOR_VALUES)):
            if getattr(self, name) is not None and getattr(self, name) not in tuple(formats.REGISTRY):
                _one_of(name, getattr(self, name), allowed)
        if self.values is not None:
            try:
                formats.check_values(self.values)
            except ValueError as error:
                raise ValueError(f"values={self.values!r}: {error}") from None
        for name in ("sinks", "window"):
            given = getattr(self, name)
            if given is not None and (type(given) is not int or given < 0):
                raise ValueError(f"{name}={given!r}; give a number of tokens, 0 or more")
        for name in ("strict", "centre"):
            if not isinstance(getattr(self, name), bool) and (name, getattr(self, name)) != ("centre", None):
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed are True and False")
        if not isinstance(self.disable, (str, tuple, list, set, frozenset)):
            raise ValueError(f"disable={self.disable!r}; give names of passes, of: {', '.join(PASSES)}")
        disable = (self.disable,) if isinstance(self.disable, str) else tuple(self.disable)
        for name in disable:
            _one_of("disable", name, PASSES)
        object.__setattr__(self, "disable", disable)
        _one_of("inner", self.inner, INNERS)
        if not isinstance(self.dump, (str, os.PathLike, type(None))) or self.dump == "":
            raise ValueError(f"dump={self.dump!r}; give the path of a folder, or None")
        if self.dump is not None:
            object.__setattr__(self, "dump", Path(self.dump))

    @cached_property
    def chosen(self) -> Preset:
        """The preset, and what is given beside it."""
        preset = formats.PRESETS[self.preset]
        if self.keys or self.values:
            preset = Preset(self.keys or preset.keys, self.values or preset.values)
        given = {name: getattr(self, name) for name in EXTRAS}
        return replace(preset, **{name: value for name, value in given.items() if value is not None})

    @property
    def key_codec(self) -> Codec:
        return formats.codec(self.chosen.keys)

    @property
    def value_codec(self) -> Codec:
        return formats.codec(self.chosen.values)

    def digest(self) -> str:
        """Equal exactly where two sets of options compile a graph alike."""
        codecs = self.key_codec.digest(), self.value_codec.digest()
        content = (*codecs, self.chosen, self.strict, sorted(self.disable), self.inner)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def resolve(given: Mapping[str, Any] | None = None, defaults: Options | None = None) -> Options:
    """Options of `given`, over `defaults` or those of the environment; a given preset overrides all of its parts.

    Raises:
        ValueError: an unknown name or value; says what was given, what is allowed, and the nearest match.
    """
    given = dict(given or {})
    _check_names(given)
    if "preset" in given:
        given = dict.fromkeys(("keys", "values", *EXTRAS)) | given
    return replace(defaults or _from_environment(), **given)


@contextmanager
def as_defaults(given: Mapping[str, str]) -> Iterator[None]:
    """While this is open, TQCOMPILE_OPTIONS says `given` too: what a compile takes that does not say otherwise.

    A given preset overrides all of its parts.

    Raises:
        ValueError: an unknown name or value.
    """
    before = os.environ.get(ENVIRONMENT)
    replaced = {*given, "keys", "values", *EXTRAS} if "preset" in given else set(given)
    kept = [item for item in (before or "").split(",") if item.strip()]
    kept = [item for item in kept if item.partition("=")[0].strip() not in replaced]
    os.environ[ENVIRONMENT] = ",".join([*kept, *(f"{name}={value}" for name, value in given.items())])
    try:
        _from_environment()
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


def _check_names(given: Mapping[str, Any]) -> None:
    for name in given:
        _one_of("option", name, tuple(field.name for field in fields(Options)))


def _from_environment() -> Options:
    try:
        given = dict(map(_parse, filter(None, map(str.strip, os.environ.get(ENVIRONMENT, "").split(",")))))
        _check_names(given)
        return Options(**given)
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT}: {error}") from None


def _parse(item: str) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in item.partition("="))
    if not equals:
        raise ValueError(f"{item!r} is not name=value; an example is keys=turboquant:4,values=q8_0")
    if name in ("strict", "centre"):
        return name, _boolean(name, value)
    if name in ("sinks", "window"):
        return name, int(value) if value.isdecimal() else value
    return name, tuple(value.split("+")) if name == "disable" else value


def _boolean(name: str, value: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    _one_of(name, value.lower(), tuple(words))
    return words[value.lower()]


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
    raise ValueError(f"{name}={value!r} is unknown; did you mean {near!r}? Allowed: {', '.join(allowed)}")
