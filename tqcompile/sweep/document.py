"""The page that is made from records: counts on top, a row an architecture, and every reason by its number."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from tqcompile.sweep import verdict
from tqcompile.sweep.build import FAMILIES, Architecture
from tqcompile.sweep.examine import CODEC_TOLERANCE, DENSE, INDUCTOR, LOSSLESS, LOSSLESS_TOLERANCE
from tqcompile.sweep.scenarios import SCENARIOS
from tqcompile.sweep.verdict import Record

INTRODUCTION = """\
# Architectures

`python -m tqcompile sweep` makes a tiny random model of each architecture of the installed transformers package,
compiles it with this backend, and compares what it says with the same model run eagerly. A model that takes pictures is
given text alone, unless its `forward` asks for pixels.

{ran}


Compiled by `{inner}`, dense and compressed. An error is the largest difference of a logit over the largest logit of
that call. Lossless is the codec that stores the numbers themselves, against the untouched model (tolerance
{lossless:g}); a codec is held to the eager model whose caches hold what that codec left (tolerance {codec:g}).
"""
LEGEND = """\
`caches` counts tensors of keys and values of the model's own tokens, compressed of all, after each scenario. `read by`
names what reads codes: `attend` is the one fused operator, `logits` and `mix` are the two products around a softmax
that the model spells out, `decoded` is a reader that no rule knows. States of recurrences and convolutions are no such
caches. What dense compilation does not get through counts for neither. Numbers in brackets are reasons, listed
below.
"""


def write(path: Path, records: Sequence[Record], without: Sequence[Architecture] = ()) -> None:
    """Write the page of `records`, and of the architectures `without` one, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(records, without))


def page(records: Sequence[Record], without: Sequence[Architecture] = ()) -> str:
    """The whole page, as Markdown."""
    if not records:
        return "# Architectures\n\nNo architecture has been examined.\n"
    reasons = _Reasons()
    tables = [_family(family, records, reasons) for family in FAMILIES]
    parts = [_introduction(records), summary(records, "github"), LEGEND, _not_examined(without)]
    parts += [*tables, _problems(records), str(reasons)]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def _introduction(records: Sequence[Record]) -> str:
    versions = Counter(", ".join(f"{name} {v}" for name, v in record["versions"].items()) for record in records)
    ran = Counter(name for record in records for name in record["scenarios"])
    rows = [("versions", version, count) for version, count in versions.items()]
    rows += [("scenario", scenario.name, ran[scenario.name]) for scenario in SCENARIOS if ran[scenario.name]]
    plain = Counter(
        f"Inductor of torch {result['torch']}, {name}"
        for record in records
        for name, result in verdict.results(record, INDUCTOR)
    )
    rows += [("dense, too", name, count) for name, count in plain.items()]
    return INTRODUCTION.format(
        ran=tabulate(rows, ("", "", "architectures"), "github"),
        inner=", ".join(dict.fromkeys(record["inner"] for record in records)),
        lossless=LOSSLESS_TOLERANCE,
        codec=CODEC_TOLERANCE,
    )


def _not_examined(without: Sequence[Architecture]) -> str:
    names = ", ".join(architecture.key for architecture in without)
    return f"{len(without)} architectures have not been examined yet, and count nowhere: {names}.\n" if without else ""


def summary(records: Sequence[Record], style: str = "simple") -> str:
    """Counts for each family and all together."""
    rows = [_counts(family, [r for r in records if r["family"] == family]) for family in FAMILIES]
    rows = [row for row in rows if row[1]]
    if len(rows) > 1:
        rows.append(_counts("all", list(records)))
    headers = (
        "",
        "architectures",
        "made",
        "keep keys and values",
        "every cache compressed",
        "and none decoded",
        "and every read fused",
    )
    return tabulate(rows, (*headers, "wrong or failing"), style)


def _counts(name: str, records: list[Record]) -> tuple:
    made = [record for record in records if verdict.made(record)]
    keeping = [record for record in made if verdict.has_cache(record)]
    full = [record for record in keeping if verdict.all_compressed(record)]
    on_codes = [record for record in full if verdict.all_on_codes(record)]
    fused = [record for record in full if verdict.all_fused(record)]
    bad = [record for record in records if verdict.problems(record)]
    shares = (
        f"{len(part)}{f' ({len(part) / len(keeping):.0%})' if keeping else ''}" for part in (full, on_codes, fused)
    )
    return (name, len(records), len(made), len(keeping), *shares, len(bad))


class _Reasons:
    """Reasons by number, in the order they come up, and where each of the architectures that have it has it."""

    def __init__(self):
        self.places: dict[str, dict[str, str]] = {}

    def number(self, name: str, what: str, where: str = "") -> str:
        self.places.setdefault(what, {}).setdefault(name, where)
        return f"[{list(self.places).index(what) + 1}]"

    def __str__(self) -> str:
        lines = []
        for number, (what, places) in enumerate(self.places.items(), 1):
            names = (f"{name} (`{where}`)" if where else name for name, where in places.items())
            lines.append(f"{number}. {what}: {', '.join(names)}")
        return "## Reasons\n\n" + "\n".join(lines) + "\n" if lines else ""


def _family(family: str, records: Sequence[Record], reasons: _Reasons) -> str:
    own = [record for record in records if record["family"] == family]
    if not own:
        return ""
    names = sorted({codec for record in own for codec in verdict.codecs(record)})
    headers = ("architecture", "caches", "read by", "remarks", "dense compile", LOSSLESS, *names, "wrong")
    rows = [_row(record, names, reasons) for record in own]
    return f"## {family}\n\n" + tabulate(rows, headers, "github", disable_numparse=True) + "\n"


def _row(record: Record, names: list[str], reasons: _Reasons) -> tuple:
    name = record["name"]
    if not verdict.made(record):
        why = record.get("not_made") or record.get("died", "no record")
        return (name, "not made", "", reasons.number(name, f"not made: {why}", record.get("where", "")))
    return (
        name,
        _caches(record),
        _readers(record),
        " ".join(dict.fromkeys(reasons.number(name, *reason) for reason in verdict.reasons(record))),
        _dense(record),
        *(_number(verdict.worst(record, mode)) for mode in (LOSSLESS, *names)),
        "; ".join(dict.fromkeys(f"{p.scenario} {p.mode}".strip() for p in verdict.problems(record))),
    )


def _caches(record: Record) -> str:
    if verdict.has_cache(record):
        return "{} / {}".format(*verdict.caches(record))
    fell = any("self" in scenario.get("dense_held", ()) for scenario in record["scenarios"].values())
    return "none that compiles" if fell else "none kept"


def _dense(record: Record) -> str:
    """What plain compilation makes of it."""
    ran = {mode: any(verdict.results(record, mode)) for mode in (DENSE, INDUCTOR)}
    fails = [*verdict.dense_fails(record), *(f"{name} by Inductor" for name in verdict.dense_fails(record, INDUCTOR))]
    return f"fails: {', '.join(fails)}" if fails else "works" if any(ran.values()) else "not run"


def _number(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}" if error else "0"


def _readers(record: Record) -> str:
    found: dict[str, int] = {}
    for _, result in verdict.results(record, LOSSLESS):
        for name, count in result.get("reads", {}).items():
            found[name] = found.get(name, 0) + count
        found["decoded"] = found.get("decoded", 0) + sum(row[-1] for row in result.get("fallbacks", ()))
    return ", ".join(f"{name} {count}" for name, count in found.items() if count)


def _problems(records: Sequence[Record]) -> str:
    rows = [
        (record["name"], problem.scenario, problem.mode, problem.what.replace("|", "\\|"), problem.where)
        for record in records
        for problem in verdict.problems(record)
    ]
    if not rows:
        return ""
    table = tabulate(rows, ("architecture", "scenario", "mode", "what", "where"), "github", disable_numparse=True)
    return "## Wrong or failing, where dense compilation is not\n\n" + table + "\n"
