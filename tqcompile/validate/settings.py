"""How much is measured, and how."""

from dataclasses import dataclass, field
from pathlib import Path

from tqcompile.options import INNERS
from tqcompile.validate import text
from tqcompile.validate.verdict import Threshold


@dataclass(frozen=True)
class Settings:
    """Tokens count those of the model's tokenizer."""

    context: int = 1024
    """Tokens of a window. The first chunk of each fills the cache; what follows is scored."""

    windows: int = 8
    """Windows, spread evenly over the text."""

    chunk: int | None = None
    """Tokens that are read in one call; None for a quarter of the context, 256 at most.

    A call keeps its own last tokens exactly, where a window is kept, and its first ones see the others as codes: few at
    a time, behind a long `prefill`, are what a generation sees.
    """

    prefill: int | None = None
    """Tokens of a window's first piece, which is not scored; None for a chunk. Needles and continuations are read in
    chunks of the usual size where this is given."""

    batch: int = 1
    """Windows that are read beside each other."""

    generate: int = 64
    """Tokens of a greedy continuation, a chunk at most; 0 for none."""

    needle: bool = False
    """Whether to look for needles."""

    tasks: Path | str | None = None
    """A folder of tasks in LongBench's format; None for none."""

    inner: str = "inductor"
    """The compiler of graphs, dense and compressed alike."""

    threshold: Threshold = field(default_factory=Threshold)
    """What is called safe."""

    def __post_init__(self):
        for name, least in (("context", 8), ("windows", 1), ("batch", 1), ("generate", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}; give a whole number of {least} or more")
        if self.inner not in INNERS:
            raise ValueError(f"inner={self.inner!r}; allowed are {', '.join(INNERS)}")
        object.__setattr__(self, "chunk", text.chunk_for(self.context, self.chunk))
        text.check_prefill(self.context, self.chunk, self.prefill)

    @property
    def usual_chunk(self) -> int:
        """Tokens of a call where no window is scored."""
        return self.chunk if self.prefill is None else text.chunk_for(self.context, None)
