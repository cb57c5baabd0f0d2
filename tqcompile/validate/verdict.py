"""Which choices are safe: a stated threshold, what each row fails of it, and one sentence."""

from dataclasses import dataclass, fields

from tqcompile.validate.result import Row


@dataclass(frozen=True)
class Threshold:
    """What a choice must keep to be called safe. Where a figure was not measured, its limit is not tested."""

    perplexity: float = 1.0
    """Per cent that perplexity may be above dense's, at the upper end of the interval of that difference."""

    top1: float = 95.0
    """Per cent of tokens whose likeliest successor is dense's, at least."""

    needle: float = 0.0
    """Needles that dense finds and the choice may lose."""

    tasks: float = 1.0
    """Points, of 100, that the mean score of all tasks may be below dense's."""

    kl: float | None = None
    """Mean KL to dense in nats, at most; None for any."""

    @classmethod
    def parse(cls, items: list[str]) -> "Threshold":
        """From texts `NAME=NUMBER`.

        Raises:
            ValueError: an unknown name, or no number of zero or more.
        """
        names, given = [field.name for field in fields(cls)], {}
        for item in items:
            name, equals, value = item.partition("=")
            try:
                number = float(value.rstrip("%"))
            except ValueError:
                number = -1.0
            if name not in names or not equals or not 0 <= number < float("inf"):
                raise ValueError(f"threshold {item!r} is not NAME=NUMBER; names are {', '.join(names)}, as in top1=95")
            given[name] = number
        return cls(**given)

    @classmethod
    def spoken(cls) -> str:
        """Every limit and its default, for a command's help."""
        said = {
            "perplexity": "per cent above dense's, at the end of the 95 %% interval",
            "top1": "per cent of tokens, at least",
            "needle": "needles lost",
            "tasks": "points lost",
            "kl": "mean, in nats",
        }
        defaults = {field.name: field.default for field in fields(cls)}
        return "; ".join(
            f"{name} {what} ({'any' if defaults[name] is None else f'{defaults[name]:g}'})"
            for name, what in said.items()
        )

    def said(self, dense: Row) -> str:
        """The limits of what was measured, as the dense row has it."""
        lost = f"at most {self.needle:g} needles are lost" if self.needle else "no needle is lost that dense finds"
        limits = [
            f"the 95 % interval of its increase of perplexity ends at {self.perplexity:g} % or less",
            f"top-1 agreement is {self.top1:g} % or more",
            lost if dense.needle else "",
            f"tasks score at most {self.tasks:g} points less" if dense.answers else "",
            f"mean KL is {self.kl:g} or less" if self.kl is not None else "",
        ]
        return ", ".join(filter(None, limits))


def failures(row: Row, dense: Row, limit: Threshold) -> list[str]:
    """What a row fails; nothing where it is safe."""
    if row.trouble:
        return [f"its run stopped: {row.trouble}"]
    found = [f"a cache stayed dense: {row.dense_caches[0]}"] if row.dense_caches else []
    quality, lost = row.quality, row.lost(dense)
    # Written so that what is not a number fails.
    if not 100 * quality.increase.high <= limit.perplexity:
        found.append(f"perplexity {interval(row)}")
    if not 100 * quality.top1 >= limit.top1:
        found.append(f"top-1 {quality.top1:.1%}")
    if not lost <= limit.needle:
        found.append(f"{lost} needles lost")
    points = fallen(row, dense)
    if not points <= limit.tasks:
        found.append(f"tasks {points:.1f} points lower")
    if limit.kl is not None and not quality.kl <= limit.kl:
        found.append(f"KL {quality.kl:.4f}")
    return found


def interval(row: Row) -> str:
    """The increase of perplexity in per cent, with its interval."""
    increase = row.quality.increase
    return f"{100 * increase.mean:+.2f} % [{100 * increase.low:+.2f}, {100 * increase.high:+.2f}]"


def mean_score(row: Row) -> float:
    """The mean score of all tasks, of 100."""
    scores = row.tasks.values()
    return sum(scores) / len(scores)


def fallen(row: Row, dense: Row) -> float:
    """Points that the mean score of the tasks is below dense's; 0 where there are none."""
    return mean_score(dense) - mean_score(row) if dense.answers else 0.0


def sentence(rows: list[Row], dense: Row, failed: dict[str, list[str]], limit: Threshold) -> str:
    """Which choices are safe and which are not, and what of."""
    safe = [row.name for row in rows if not failed[row.name]]
    unsafe = [f"{row.name} ({', '.join(failed[row.name])})" for row in rows if failed[row.name]]
    said = [f"safe {'are' if len(safe) > 1 else 'is'} {', '.join(safe)}"] if safe else ["none of them is safe"]
    said += [f"not safe {'are' if len(unsafe) > 1 else 'is'} {', '.join(unsafe)}"] if unsafe else []
    return f"Safe means here that {limit.said(dense)}: {'; '.join(said)}."
