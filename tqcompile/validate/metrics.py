"""The scores of LongBench (arXiv 2308.14508), in 0..1: each compares a prediction with one right answer.

Chinese tasks that are scored by words are left out: they need a dictionary to find those.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
COMMENTS = ("`", "#", "//")


def token_f1(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """Harmonic mean of precision and recall over words, without case, punctuation and articles."""
    ours, theirs = (_plain(text) for text in (prediction, truth))
    return _harmonic(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def _plain(text: str) -> list[str]:
    bare = text.lower().translate(PUNCTUATION)
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split()


def _harmonic(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def rouge_l(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """F1 of summary-level ROUGE-L: words in a longest common subsequence of any two sentences, each word once.

    As the package `rouge` counts, which LongBench scores with: sentences end at full stops, and words are told apart by
    spaces alone.
    """
    ours, theirs = (_sentences(text) for text in (prediction, truth))
    common = {word for one in theirs for other in ours for word in _subsequence(one, other)}
    words = [{word for sentence in side for word in sentence} for side in (ours, theirs)]
    return _harmonic(len(common), *map(len, words))


def _sentences(text: str) -> list[tuple[str, ...]]:
    return [words for words in (tuple(part.split()) for part in text.split(".")) if words]


def _subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that a walk from the end finds which moves in `y` first."""
    lengths = [[0] * (len(y) + 1)]
    for word in x:
        row = [0]
        for at, other in enumerate(y):
            row.append(lengths[-1][at] + 1 if word == other else max(lengths[-1][at + 1], row[-1]))
        lengths.append(row)
    i, j, found = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            found.append(x[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def classification(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """The right class is named: 1 over the classes that are, but for those whose name is a part of the right one's."""
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == truth or name not in truth]
    return 1 / len(named) if truth in named else 0.0


def number(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the prediction that are the one of the truth: a count, or which paragraph it is."""
    right, said = re.search(r"\d+", truth), re.findall(r"\d+", prediction)
    return said.count(right.group()) / len(said) if right and said else 0.0


def similarity(prediction: str, truth: str, classes: Sequence[str] = ()) -> float:
    """How alike the first line of code is that holds no comment, in whole per cents of matching characters."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in COMMENTS)), "")
    return round(100 * difflib.SequenceMatcher(None, line, truth).ratio()) / 100
