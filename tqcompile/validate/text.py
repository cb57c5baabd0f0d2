"""The text as token ids: windows of it that a model reads, and what its tokenizer puts in front of every text."""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch

LONGEST_CHUNK = 256
PYTHON_HELP = "the topics of Python's own help"


def python_help() -> str:
    """Prose that is on every machine, for where no text is given."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read(path: Path) -> str:
    """The text in a file.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {path} cannot be read: {str(error).splitlines()[0]}; give a UTF-8 file") from error


@dataclass(frozen=True)
class Pieces:
    """How a run of tokens is read: `first` tokens in one call, then chunks of `chunk`, `chunks` of them."""

    first: int
    chunk: int
    chunks: int

    @property
    def sizes(self) -> list[int]:
        """The tokens of each call."""
        return [self.first, *[self.chunk] * self.chunks]

    @property
    def total(self) -> int:
        return self.first + self.chunk * self.chunks


def pieces(length: int, chunk: int, prefill: int | None = None) -> Pieces:
    """`length` tokens in equal chunks behind a first piece, of a chunk or `prefill`, that takes the remainder, too."""
    chunks = max(0, (length - (chunk if prefill is None else prefill)) // chunk)
    return Pieces(length - chunk * chunks, chunk, chunks)


def chunk_for(context: int, chunk: int | None) -> int:
    """Tokens of a call after the first.

    Raises:
        ValueError: fewer than two chunks fit into the context, so that no token would be scored over codes.
    """
    if chunk is None:
        chunk = min(LONGEST_CHUNK, context // 4)
    if not 2 <= chunk <= context // 2:
        raise ValueError(
            f"context={context} and chunk={chunk}: a first chunk fills the cache, and only what comes after it is "
            f"scored; give a context of at least {max(8, 2 * chunk)} tokens, or a chunk from 2 to {context // 2}"
        )
    return chunk


def check_prefill(context: int, chunk: int, prefill: int | None) -> None:
    """Raise where nothing would be scored behind a first piece of `prefill` tokens.

    Raises:
        ValueError: it leaves no room for a chunk, or is none.
    """
    if prefill is not None and not (isinstance(prefill, int) and 1 <= prefill <= context - chunk):
        raise ValueError(
            f"context={context}, chunk={chunk} and prefill={prefill!r}: what follows the first piece is scored; give "
            f"a prefill from 1 to {context - chunk}"
        )


def tokens(tokenizer, text: str) -> list[int]:
    """Token ids of a text alone."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prefix(tokenizer) -> list[int]:
    """What the tokenizer puts in front of every text, such as a token for its beginning."""
    alone, whole = tokens(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start]
    return []


def windows(tokenizer, text: str, count: int, length: int) -> torch.Tensor:
    """`count` windows [count, length] of token ids, spread evenly over the text; each begins as a text of its own.

    Raises:
        ValueError: the text is too short for them.
    """
    start, ids = prefix(tokenizer), tokens(tokenizer, text)
    own = length - len(start)
    if len(ids) < count * own:
        fitting = len(ids) // own
        remedy = f"windows={fitting}" if fitting else f"a context of at most {len(ids) // count + len(start)}"
        raise ValueError(
            f"the text has {len(ids):,} tokens, and windows={count} of context={length} need {count * own:,}: give a "
            f"longer text, or {remedy}"
        )
    step = (len(ids) - own) // max(1, count - 1)
    return torch.tensor([start + ids[at * step : at * step + own] for at in range(count)])
