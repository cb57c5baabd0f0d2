"""What one row is made of: windows, continuations and needles, read by a model that one backend compiled."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from tqcompile.bench.compressed import live_bytes
from tqcompile.validate import greedy, needle, tasks, text
from tqcompile.validate.compare import Tokens, compare
from tqcompile.validate.damage import Damage, kept
from tqcompile.validate.reading import Reading, elements, held_bytes, tensors
from tqcompile.validate.result import Quality, Row, Size
from tqcompile.validate.settings import Settings

PROMPTS = 4


def limit(model: torch.nn.Module) -> int | None:
    """The tokens that a model reads; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def stops(model: torch.nn.Module) -> tuple[int, ...]:
    """The tokens that end what a model says."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return tuple(found) if isinstance(found, (list, tuple)) else (found,) if found is not None else ()


class Question:
    """An item of a task, as a model's tokenizer has it."""

    def __init__(self, item: tasks.Item, tokenizer, room: int, chunk: int, stop: tuple[int, ...]):
        self.item, self.tokenizer, self.stop = item, tokenizer, stop
        self.ids, self.pieces = tasks.ids(item, tokenizer, room, chunk)

    def said(self, chosen: list[int]) -> str:
        """The text of tokens."""
        return self.tokenizer.decode(chosen, skip_special_tokens=True)

    def ends(self, chosen: list[int]) -> bool:
        """Whether nothing behind these tokens counts."""
        return chosen[-1] in self.stop or (self.item.kind.first_line and "\n" in self.said(chosen).lstrip("\n"))


@dataclass(frozen=True)
class Plan:
    """What every row reads: windows [N, T] in pieces, `batch` at a time; prompts [N, T] of greedy continuations, in
    `sizes`; needles; and what is asked in tasks."""

    windows: torch.Tensor
    batch: int
    pieces: text.Pieces
    sizes: list[int]
    prompts: torch.Tensor
    generate: int
    needles: list[needle.Needle]
    items: list[Question]

    @classmethod
    def of(cls, model, tokenizer, document: str, settings: Settings) -> "Plan":
        """Raises ValueError where a text is too short for the windows, a context for needles, or tasks are none."""
        windows = text.windows(tokenizer, document, settings.windows, settings.context)
        pieces = text.pieces(settings.context, settings.chunk, settings.prefill)
        usual, chunk = text.pieces(settings.context, settings.usual_chunk), settings.usual_chunk
        generate = min(settings.generate, chunk)
        prompts = windows[:: -(-len(windows) // PROMPTS), :-chunk][: PROMPTS if generate else 0]
        room = limit(model)
        hidden = needle.needles(tokenizer, document, usual, room) if settings.needle else []
        items = tasks.read(settings.tasks) if settings.tasks else []
        room = room or settings.context
        asked = [Question(item, tokenizer, room, chunk, stops(model)) for item in items]
        return cls(windows, settings.batch, pieces, usual.sizes[:-1], prompts, generate, hidden, asked)

    @property
    def scored(self) -> int:
        """Tokens of a window that a prediction over codes is scored at: behind the first piece, and not the last."""
        return self.windows.shape[1] - self.pieces.first - 1

    @property
    def calls(self) -> int:
        """Things that are measured of one row."""
        return -(-len(self.windows) // self.batch) + len(self.prompts) + len(self.needles) + len(self.items)


@dataclass
class Exact:
    """What the dense cache gave: logits [windows, scored, vocabulary], keys and values of first pieces, continuations.

    Logits are more than memory holds where vocabularies are large, so they lie in a file of `folder`.
    """

    folder: Path
    logits: torch.Tensor | None = None
    kept: list = field(default_factory=list)
    continued: list[list[int]] = field(default_factory=list)

    def rows(self, window: int, plan: Plan, like: torch.Tensor) -> torch.Tensor:
        """Where the logits [scored, vocabulary] of a window lie; `like` are some that say of which size and dtype."""
        if self.logits is None:
            shape = (len(plan.windows), plan.scored, like.shape[-1])
            size = shape[0] * shape[1] * shape[2]
            stored = torch.from_file(str(self.folder / "logits"), shared=True, size=size, dtype=like.dtype)
            self.logits = stored.view(shape)
        return self.logits[window]


class Measure:
    """Fills `row`. The dense row is measured first, and fills `exact`; the others are compared with that."""

    def __init__(self, reading: Reading, plan: Plan, row: Row, exact: Exact, bar: tqdm):
        self.reading, self.plan, self.row, self.exact, self.bar = reading, plan, row, exact, bar
        self.is_dense = not row.keys
        self.damage = Damage.none()

    def all(self) -> None:
        """Every part of the row."""
        batches = torch.arange(len(self.plan.windows)).split(self.plan.batch)
        tokens = Tokens.stacked([window for rows in batches for window in self._windows(rows.tolist())])
        self.row.quality = Quality.of(tokens)
        self.row.damage_keys, self.row.damage_values = self.damage.relative()
        for index in range(len(self.plan.prompts)):
            self._continue(index)
        for one in self.plan.needles:
            cell, cache = needle.ask(self.reading, one)
            self.row.needle.append(cell)
            self.done(cache)
        for question in self.plan.items:
            self._answer(question)

    def done(self, cache) -> None:
        """One more thing is measured, and `cache` is what it read last."""
        if not self.is_dense:
            self.row.dense_caches = list(dict.fromkeys(self.row.dense_caches + self.reading.stayed_dense(cache)))
            self.row.decoded = self.reading.decoded()
        self.bar.update()

    def _windows(self, rows: list[int]) -> list[Tokens]:
        ids, cache, at = self.plan.windows[rows], self.reading.new_cache(), 0
        parts: list[list[Tokens]] = [[] for _ in rows]
        for number, logits in enumerate(self.reading.read(ids, self.plan.pieces.sizes, cache)):
            if number == 0:
                self._first(rows, cache)
                continue
            stop = min(at + logits.shape[1], self.plan.scored)
            for part, row, mine, tokens in zip(parts, rows, logits, ids):
                part.append(self._compared(row, at, mine[: stop - at], tokens))
            at = stop
        self.row.size = Size(live_bytes(tensors(cache)), held_bytes(cache), elements(cache))
        self.done(cache)
        return list(map(Tokens.joined, parts))

    def _compared(self, row: int, at: int, logits: torch.Tensor, ids: torch.Tensor) -> Tokens:
        """Figures of logits [T, vocabulary] at the scored tokens of a window from `at` on."""
        exact = self.exact.rows(row, self.plan, logits)[at : at + len(logits)]
        if self.is_dense:
            exact.copy_(logits)
        return compare(exact, logits, ids[self.plan.pieces.first + at + 1 :][: len(logits)])

    def _first(self, rows: list[int], cache) -> None:
        place = rows[0] // self.plan.batch
        if self.is_dense:
            self.exact.kept.append(kept(cache))
        else:
            self.damage.add(self.exact.kept[place], cache)

    def _continue(self, index: int) -> None:
        prompt = self.plan.prompts[index]
        sizes = self.plan.sizes
        if self.is_dense:
            chosen, cache = greedy.continued(self.reading, prompt, sizes, self.plan.generate)
            self.exact.continued.append(chosen)
            self.row.greedy.append(len(chosen))
        else:
            count, cache = greedy.agreement(self.reading, prompt, sizes, self.exact.continued[index])
            self.row.greedy.append(count)
        self.done(cache)

    def _answer(self, question: Question) -> None:
        item, pieces = question.item, question.pieces
        chosen, cache = greedy.continued(self.reading, question.ids, pieces.sizes, item.kind.most, question.ends)
        said = question.said(chosen)
        self.row.answers.append(tasks.Answer(item.dataset, item.name, said, item.score(said)))
        self.done(cache)
