"""What was measured: a row for the dense cache and one for each choice of codecs, and what they come to."""

from dataclasses import asdict, dataclass, field

import numpy

from tqcompile.validate.choice import Choice
from tqcompile.validate.compare import Increase, Tokens, increase
from tqcompile.validate.needle import Cell
from tqcompile.validate.tasks import Answer, means

DENSE = "dense"


@dataclass(frozen=True)
class Size:
    """Of the cache of one window: bytes of its live storages, of the tokens alone, and the numbers it stands for."""

    live_bytes: int
    held_bytes: int
    elements: int

    @property
    def bits(self) -> float:
        """Bits of a number, scales and means and all, without spare room."""
        return 8 * self.held_bytes / self.elements

    @property
    def live_bits(self) -> float:
        """Bits of live storage for a number, spare room included."""
        return 8 * self.live_bytes / self.elements


@dataclass(frozen=True)
class Quality:
    """Means over the scored tokens: nats, shares in 0..1, and the increase of perplexity as a share of dense's."""

    kl: float
    kl99: float
    top1: float
    perplexity: float
    increase: Increase

    @classmethod
    def of(cls, tokens: Tokens) -> "Quality":
        return cls(
            kl=float(tokens.kl.mean()),
            kl99=float(numpy.quantile(tokens.kl, 0.99)),
            top1=float(tokens.same.mean()),
            perplexity=float(numpy.exp(tokens.loss.mean())),
            increase=increase(tokens),
        )


@dataclass
class Row:
    """One choice, or the dense cache, whose `keys` and `values` are empty.

    `extras` says what is kept beside codes. `greedy` counts for each prompt the tokens that were dense's;
    `dense_caches` says which caches were not compressed after all, `decoded` what read codes decoded, and `trouble`
    what ended the run early. Damage is by layer.
    """

    name: str
    keys: str = ""
    values: str = ""
    extras: str = ""
    size: Size | None = None
    quality: Quality | None = None
    damage_keys: list[float] = field(default_factory=list)
    damage_values: list[float] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)
    needle: list[Cell] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    dense_caches: list[str] = field(default_factory=list)
    decoded: list[str] = field(default_factory=list)
    trouble: str = ""

    @classmethod
    def of(cls, choice: Choice) -> "Row":
        return cls(choice.name, *choice.preset.pair, choice.preset.extras)

    @property
    def tasks(self) -> dict[str, float]:
        """The score of each data set of the tasks, of 100."""
        return means(self.answers)

    @property
    def found(self) -> int:
        """Needles that were found."""
        return sum(cell.found for cell in self.needle)

    def lost(self, dense: "Row") -> int:
        """Needles that dense found and this did not."""
        return sum(theirs.found and not ours.found for ours, theirs in zip(self.needle, dense.needle, strict=True))

    def record(self) -> dict:
        """As JSON holds it."""
        plain = asdict(self)
        if self.size is not None:
            plain |= {"bits": self.size.bits, "live_bits": self.size.live_bits}
        plain |= {"pair": f"{self.keys}/{self.values}", "tasks": self.tasks}
        if self.quality is not None:
            plain |= {name: getattr(self.quality, name) for name in ("kl", "kl99", "top1", "perplexity")}
        return plain


@dataclass(frozen=True)
class Result:
    """`head` says what was measured and how; `failures` names for each choice what it fails, nothing where it is safe.

    `notes` say what a figure is and is not; `verdict` is the sentence that it all ends in.
    """

    head: dict[str, str]
    dense: Row
    rows: list[Row]
    failures: dict[str, list[str]]
    notes: list[str]
    verdict: str

    @property
    def safe(self) -> list[str]:
        """The choices that pass."""
        return [row.name for row in self.rows if not self.failures[row.name]]

    def record(self) -> dict:
        """All of it, as JSON holds it."""
        return {
            **self.head,
            "setting": f"{self.head['text']}, {self.head['versions']}",
            "dense": self.dense.record(),
            "rows": [{**row.record(), "failures": self.failures[row.name]} for row in self.rows],
            "safe": self.safe,
            "notes": self.notes,
            "verdict": self.verdict,
        }
