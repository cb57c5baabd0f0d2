"""One published figure and ours beside it: what it is, and whether the two are the same number."""

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, NamedTuple

from tqcompile.paper.measure import Estimate

Kind = Literal["bound", "computed", "exact", "counted", "claimed", ""]
Relation = Literal["=", "<=", ">="]

STANDARD_ERRORS = 3
# Theory is of the best codebook: the one in use loses up to 0.2 % (`tables.integers`).
THEORY_ERRORS, THEORY_SLACK = 4, 2e-3
# Doubles that should be equal.
NOTHING = 1e-9
# A limit is taken for what was printed where it would be but for a digit that nobody prints.
LAST_DIGIT = 1e-3


class Published(NamedTuple):
    """A number as it was published, `rounding` off at most; or a limit that it is said to keep."""

    value: float
    rounding: float = 0.0
    relation: Relation = "="

    @classmethod
    def digits(cls, text: str) -> "Published":
        """A number that was printed so: half a unit of its last digit is its rounding."""
        return cls(float(text), 0.5 * 10.0 ** Decimal(text).as_tuple().exponent)

    def over(self, other: "Published") -> "Published":
        """The ratio of two rounded numbers."""
        ratio = self.value / other.value
        return Published(ratio, ratio * (self.rounding / self.value + other.rounding / other.value))

    def beyond(self, value: float, chance: float) -> float:
        """How far `value` is from this, beyond its rounding and chance; 0 where it is not."""
        apart = value - self.value
        apart = {"=": abs(apart), "<=": apart, ">=": -apart}[self.relation]
        return max(0.0, apart - self.rounding - chance - NOTHING)


@dataclass(frozen=True)
class Figure:
    """A row: what a codec does, what was published of it, and what theory says for the bases in use.

    `ours` is None where no codec does this, `published` where the paper has no number for it. `kind` is of the
    published one: a proved `bound`, `computed` from the algorithm, `exact` in closed form, `counted` bits, or `claimed`
    without a derivation. `limit` is theory's number at large head_dim, for which papers print theirs. `spread` is the
    standard deviation of ours over random bases, where the published number is a mean over them. `otherwise` says what
    ours does in another way on purpose, `because` why the published number is another.
    """

    what: str
    where: str
    kind: Kind
    published: Published | None
    ours: Estimate | None
    theory: float | None = None
    limit: float | None = None
    spread: float = 0.0
    otherwise: str = ""
    because: str = ""

    @property
    def excess(self) -> float:
        """How far ours is from what was published, beyond rounding and chance; 0 where it is not."""
        if self.ours is None or self.published is None:
            return 0.0
        chance = STANDARD_ERRORS * math.hypot(self.ours.error, self.spread)
        return self.published.beyond(self.ours.value, chance)

    @property
    def is_wrong(self) -> bool:
        """Whether ours is not what theory says."""
        if self.ours is None or self.theory is None:
            return False
        chance = THEORY_ERRORS * self.ours.error + THEORY_SLACK * abs(self.theory)
        return abs(self.ours.value - self.theory) > chance + NOTHING

    @property
    def is_of_large_vectors(self) -> bool:
        """Whether what was published is right at large head_dim."""
        return self.limit is not None and not self.published.beyond(self.limit, LAST_DIGIT * abs(self.limit))

    @property
    def off(self) -> str:
        """By how much ours differs from what was published, in words; empty where there are no two."""
        if self.ours is None or self.published is None:
            return ""
        apart = self.ours.value - self.published.value
        relative = f"{apart / self.published.value:+.1%}" if self.published.value else f"{apart:+.1g}"
        if self.published.relation == "=":
            return relative
        return f"broken, {relative}" if self.excess else f"holds, {relative}"
