"""Tasks in LongBench's format: JSONL files of questions with their contexts and right answers.

The prompts here are not the published ones. Where the folder holds LongBench's own `dataset2prompt.json` and
`dataset2maxlen.json`, those are used. No chat template is applied.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tqcompile.validate import metrics
from tqcompile.validate.text import Pieces, pieces, prefix, tokens

ASK = "{context}\n\nAnswer the question from the text above, in a few words.\nQuestion: {input}\nAnswer:"
SUM_UP = "{context}\n\n{input}\nThe text above in a few sentences:"
GO_ON = "{context}\n{input}"
WHICH = "{context}\n\nOne of these paragraphs is described so: {input}\nThe description is of Paragraph"
COUNT = "{context}\n\nSome of the paragraphs above are repeated. The number of different paragraphs is"
FIELDS = ("input", "context", "answers")


@dataclass(frozen=True)
class Kind:
    """How a data set is asked and scored, and how many tokens an answer has at most."""

    prompt: str
    score: Callable[..., float]
    most: int
    first_line: bool = False


def _kinds() -> dict[str, Kind]:
    f1, rouge = metrics.token_f1, metrics.rouge_l
    found = {name: Kind(ASK, f1, most) for name, most in (("narrativeqa", 128), ("qasper", 128))}
    found |= {name: Kind(ASK, f1, 32) for name in ("hotpotqa", "2wikimqa", "musique")}
    found |= {name: Kind(SUM_UP, rouge, 512) for name in ("gov_report", "qmsum", "multi_news")}
    found |= {name: Kind(GO_ON, metrics.classification, 64, True) for name in ("trec", "lsht")}
    found |= {name: Kind(WHICH, metrics.number, 32) for name in ("passage_retrieval_en", "passage_retrieval_zh")}
    found |= {name: Kind("{context}{input}", metrics.similarity, 64) for name in ("lcc", "repobench-p")}
    return found | {
        "multifieldqa_en": Kind(ASK, f1, 64),
        "triviaqa": Kind(GO_ON, f1, 32, True),
        "samsum": Kind(GO_ON, rouge, 128, True),
        "passage_count": Kind(COUNT, metrics.number, 32),
    }


KINDS = _kinds()


@dataclass(frozen=True)
class Item:
    """One question: a prompt, its right answers, and how what is said to it is scored."""

    dataset: str
    name: str
    prompt: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    kind: Kind

    def score(self, said: str) -> float:
        """The best score that an answer of the model has with any right one, in 0..1."""
        said = said.lstrip("\n").split("\n")[0] if self.kind.first_line else said
        return max(self.kind.score(said, answer, self.classes) for answer in self.answers)


@dataclass(frozen=True)
class Answer:
    """What a model said to an item, and its score in 0..1."""

    dataset: str
    name: str
    said: str
    score: float


def read(folder: Path | str) -> list[Item]:
    """Every item of every file .jsonl in a folder.

    Raises:
        ValueError: no such file, a line that is no item, or a data set that has no score here.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise ValueError(f"--tasks {folder} is no folder with files .jsonl in LongBench's format")
    prompts, most = (_table(folder / f"dataset2{name}.json") for name in ("prompt", "maxlen"))
    items = []
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        items += [
            _item(f"{file}, line {at}", file.stem, line, prompts, most) for at, line in enumerate(lines, 1) if line
        ]
    if not items:
        raise ValueError(f"--tasks {folder}: its files hold no items")
    return items


def _table(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _item(where: str, stem: str, line: str, prompts: dict, most: dict) -> Item:
    try:
        facts = json.loads(line)
        missing = [name for name in FIELDS if name not in facts]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"--tasks {where} is no JSON object: {error}") from error
    if missing or not facts["answers"]:
        raise ValueError(f"--tasks {where} has no {missing[0] if missing else 'answers'}; it needs {', '.join(FIELDS)}")
    dataset = facts.get("dataset") or stem
    if dataset not in KINDS:
        raise ValueError(
            f"--tasks {where}: data set {dataset!r} has no score here; those with one are {', '.join(sorted(KINDS))}"
        )
    kind = KINDS[dataset]
    kind = Kind(prompts.get(dataset, kind.prompt), kind.score, most.get(dataset, kind.most), kind.first_line)
    prompt = kind.prompt.format(context=facts["context"], input=facts["input"])
    classes = tuple(facts.get("all_classes") or ())
    return Item(dataset, str(facts.get("_id", where)), prompt, tuple(map(str, facts["answers"])), classes, kind)


def ids(item: Item, tokenizer, room: int, chunk: int) -> tuple[torch.Tensor, Pieces]:
    """Token ids of a prompt, and how it is read; cut in its middle where it and its answer exceed `room` tokens."""
    start, own = prefix(tokenizer), tokens(tokenizer, item.prompt)
    most = room - len(start) - item.kind.most
    if len(own) > most:
        own = own[: -(-most // 2)] + own[len(own) - most // 2 :]
    return torch.tensor(start + own), pieces(len(start + own), chunk)


def means(answers: list[Answer]) -> dict[str, float]:
    """The mean score of each data set, of 100."""
    found: dict[str, list[float]] = {}
    for answer in answers:
        found.setdefault(answer.dataset, []).append(answer.score)
    return {name: 100 * sum(scores) / len(scores) for name, scores in found.items()}
