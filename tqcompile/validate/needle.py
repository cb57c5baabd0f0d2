"""A needle in a haystack: one fact in a long text, asked for at its end, at several depths and lengths.

The fact is a number that a place's name goes with; facts of other places lie around it. The answer is read token by
token, each after the right ones before it, so that its probability and whether it is the likeliest are both known.
"""

import math
import random
from dataclasses import dataclass

import torch

from tqcompile.validate.reading import Reading
from tqcompile.validate.text import Pieces, prefix, tokens

DEPTHS, LENGTHS, OTHERS, DIGITS = (0.0, 0.25, 0.5, 0.75, 1.0), 3, 3, 5
# Tokens of an answer, at most: a token a digit, and what stands between.
ANSWER = 2 * DIGITS
SYLLABLES = ("bar", "dol", "fen", "gar", "hol", "kin", "lor", "mar", "nes", "pol", "rin", "sul", "tor", "vel", "wen")
FACT = "\n\nThe number of the house in {place} is {number}.\n\n"
QUESTION = "\n\nThe number of the house in {place} is"


@dataclass(frozen=True)
class Needle:
    """A prompt [T] that is read in `sizes`, and the answer [A] that it asks for."""

    depth: float
    ids: torch.Tensor
    sizes: tuple[int, ...]
    answer: torch.Tensor


@dataclass(frozen=True)
class Cell:
    """One place of the grid: depth in 0..1, tokens of the prompt, mean log-probability of an answer's token in nats,
    and whether each of them was the likeliest."""

    depth: float
    length: int
    logprob: float
    found: bool


def lengths(whole: Pieces, room: int | None) -> list[Pieces]:
    """Up to `LENGTHS` lengths between the shortest and the whole context, of the pieces that windows are read in.

    A model that reads `room` tokens has them for the answer, too; None for any.
    """
    most = whole.chunks if room is None else min(whole.chunks, (room - ANSWER - whole.first) // whole.chunk)
    steps = min(LENGTHS, most)
    counts = dict.fromkeys(math.ceil(most * (at + 1) / steps) for at in range(steps))
    return [Pieces(whole.first, whole.chunk, count) for count in counts]


def needles(tokenizer, text: str, whole: Pieces, room: int | None, seed: int = 0) -> list[Needle]:
    """The prompts of every cell, by length and then depth.

    Raises:
        ValueError: the context is too short for a fact and a question.
    """
    draw, hay = random.Random(seed), tokens(tokenizer, text)
    found = [_needle(tokenizer, hay, depth, size, draw) for size in lengths(whole, room) for depth in DEPTHS]
    if not found:
        raise ValueError(
            f"needle: a model of {room} tokens has no room for an answer behind {whole.total}; give a "
            "shorter context, or leave the needle out"
        )
    return found


def _needle(tokenizer, hay: list[int], depth: float, size: Pieces, draw: random.Random) -> Needle:
    places = _places(draw, OTHERS + 1)
    numbers = ["".join(str(draw.randrange(10)) for _ in range(DIGITS)) for _ in places]
    facts = [tokens(tokenizer, FACT.format(place=place, number=number)) for place, number in zip(places, numbers)]
    question, answer = _asked(tokenizer, QUESTION.format(place=places[0]), f" {numbers[0]}")
    start = prefix(tokenizer)
    room = size.total - len(start) - len(question) - sum(map(len, facts))
    if room < 0:
        raise ValueError(
            f"needle: {size.total} tokens have no room for {len(facts)} facts and a question; give a longer context, "
            "or leave the needle out"
        )
    at = draw.randrange(max(1, len(hay) - room))
    straw = (hay * (room // max(1, len(hay)) + 2))[at : at + room]
    cuts = [round(depth * room), *(draw.randrange(room + 1) for _ in facts[1:])]
    for cut, fact in sorted(zip(cuts, facts), key=lambda pair: pair[0], reverse=True):
        straw = straw[:cut] + fact + straw[cut:]
    ids = torch.tensor(start + straw + question)
    return Needle(depth, ids, tuple(size.sizes), torch.tensor(answer))


def _places(draw: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.sample(SYLLABLES, 2)).capitalize()] = None
    return list(found)


def _asked(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a question and of its answer, as they are when one follows the other."""
    alone, whole = tokens(tokenizer, question), tokens(tokenizer, question + answer)
    same = next((at for at, (x, y) in enumerate(zip(alone, whole)) if x != y), min(len(alone), len(whole)))
    return whole[:same], whole[same:]


def ask(reading: Reading, needle: Needle) -> tuple[Cell, object]:
    """What the model makes of one needle, and the cache it read it from."""
    cache = reading.new_cache()
    last = reading.last(needle.ids, list(needle.sizes), cache)
    logprobs, found = [], True
    for at, token in enumerate(needle.answer):
        scores = last.double().log_softmax(-1)
        logprobs.append(float(scores[token]))
        found = found and int(scores.argmax()) == int(token)
        if at + 1 < len(needle.answer):
            last = reading.call(token[None], cache)[-1]
    return Cell(needle.depth, len(needle.ids), sum(logprobs) / len(logprobs), found), cache
