"""Which codecs are measured: a preset, one codec for both caches, or a pair KEYS/VALUES."""

from dataclasses import dataclass

from tqcompile import formats
from tqcompile.options import resolve


@dataclass(frozen=True)
class Choice:
    """What a user calls it, and the options of the backend that this means."""

    name: str
    options: tuple[tuple[str, str], ...]

    @property
    def pair(self) -> tuple[str, str]:
        """The names of the codecs of keys and of values."""
        options = resolve(dict(self.options))
        return options.key_codec.name, options.value_codec.name


def choice(text: str) -> Choice:
    """The choice that `text` names.

    Raises:
        ValueError: it is neither a preset nor a codec nor a pair of codecs.
    """
    if text in formats.PRESETS:
        return Choice(text, (("preset", text),))
    halves = text.split("/")
    if len(halves) > 2 or not all(halves):
        raise ValueError(f"codecs {text!r} is not KEYS/VALUES; give one codec for both, or two with one / between")
    found = Choice(text, (("keys", halves[0]), ("values", halves[-1])))
    try:
        resolve(dict(found.options))
    except ValueError as error:
        raise ValueError(f"codecs {text!r}: {error}. Presets: {', '.join(formats.PRESETS)}") from None
    return found


def choices(texts: list[str] | None) -> list[Choice]:
    """The choices that are named, each once; every preset where nothing is.

    Raises:
        ValueError: an empty list, or a name that means nothing.
    """
    names = list(formats.PRESETS) if texts is None else [name.strip() for text in texts for name in text.split(",")]
    if not names:
        raise ValueError("codecs is empty; name at least one codec, pair or preset, or leave it out for every preset")
    return [choice(name) for name in dict.fromkeys(names)]
