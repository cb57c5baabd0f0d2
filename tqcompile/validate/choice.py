"""Which codecs are measured: a preset, one codec for both caches, or a pair KEYS/VALUES."""

from dataclasses import dataclass

from tqcompile import formats
from tqcompile.options import resolve


@dataclass(frozen=True)
class Choice:
    """What a user calls it, and the options of the backend that this means."""

    name: str
    options: tuple[tuple[str, object], ...]

    @property
    def preset(self) -> formats.Preset:
        """How it keeps both caches."""
        return resolve(dict(self.options)).chosen


def choice(text: str) -> Choice:
    """The choice that `text` names: a preset, a codec or KEYS/VALUES, with +centre, +sinks=N and +window=N behind it.

    It means the same whatever TQCOMPILE_OPTIONS says.

    Raises:
        ValueError: it is neither a preset nor a codec nor a pair of codecs, or something else is behind it.
    """
    named, *extras = text.split("+")
    halves = named.split("/")
    if named in formats.PRESETS:
        options = {"preset": named}
    elif len(halves) > 2 or not all(halves):
        raise ValueError(f"codecs {text!r} is not KEYS/VALUES; give one codec for both, or two with one / between")
    else:
        options = {"preset": formats.DEFAULT, "keys": halves[0], "values": halves[-1]}
    try:
        found = Choice(text, tuple((options | dict(map(_extra, extras))).items()))
        resolve(dict(found.options))
    except ValueError as error:
        raise ValueError(f"codecs {text!r}: {error}. Presets: {', '.join(formats.PRESETS)}") from None
    return found


def _extra(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if name == "centre" and not equals:
        return name, True
    if name in ("sinks", "window") and value.isdecimal():
        return name, int(value)
    raise ValueError(f"{text!r} is none of +centre, +sinks=N and +window=N")


def choices(texts: list[str] | None) -> list[Choice]:
    """The choices that are named, each once; every preset where nothing is.

    Raises:
        ValueError: an empty list, or a name that means nothing.
    """
    names = list(formats.PRESETS) if texts is None else [name.strip() for text in texts for name in text.split(",")]
    if not names:
        raise ValueError("codecs is empty; name at least one codec, pair or preset, or leave it out for every preset")
    return [choice(name) for name in dict.fromkeys(names)]
