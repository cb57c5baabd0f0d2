"""What validate is made of: scores by hand-computed values, intervals, windows, needles, thresholds."""

import json
import math
import pathlib
from dataclasses import replace

import numpy
import pytest
import torch

from tqcompile import formats
from tqcompile.options import ENVIRONMENT
from tqcompile.validate import Settings, Threshold, metrics, needle, tasks, text
from tqcompile.validate.choice import choice, choices
from tqcompile.validate.compare import Increase, Tokens, block_size, compare, increase
from tqcompile.validate.result import Quality, Row
from tqcompile.validate.verdict import failures, sentence

SAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "longbench_sample"


class Characters:
    """A tokenizer of characters that puts a token in front of every text where `first` is given."""

    def __init__(self, first: int | None = None):
        self.first = [] if first is None else [first]

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": (self.first if add_special_tokens else []) + [ord(character) for character in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_long_first_piece_is_read_before_short_ones():
    assert text.pieces(100, 4, 60) == text.Pieces(60, 4, 10)
    assert text.pieces(101, 4, 60) == text.Pieces(61, 4, 10)
    assert text.pieces(100, 25) == text.Pieces(25, 25, 3)
    for wrong in (0, 97, 100, 2.0):
        with pytest.raises(ValueError, match=r"prefill.*from 1 to 96"):
            Settings(context=100, chunk=4, prefill=wrong)
    assert Settings(context=100, chunk=4, prefill=96).usual_chunk == 25


@pytest.mark.parametrize(
    ("score", "prediction", "truth", "value"),
    [
        # Two of three words and two of four: 2 x 2 / (3 + 4).
        (metrics.token_f1, "The red boat, sailed", "a red boat is slow", 4 / 7),
        (metrics.token_f1, "red red", "red", 2 / 3),
        (metrics.token_f1, "", "red", 0),
        # One sentence has w1 w2 in common, the other w1 w3 w5: four of five words, and four of eight.
        (metrics.rouge_l, "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5.", "w1 w2 w3 w4 w5", 8 / 13),
        # In another order only one of two words is a subsequence.
        (metrics.rouge_l, "b a", "a b", 1 / 2),
        (metrics.rouge_l, "a a a", "a", 1),
        (metrics.rouge_l, ".", "a b", 0),
        (metrics.number, "3, or perhaps 4", "Paragraph 3", 1 / 2),
        (metrics.number, "13", "3", 0),
        (metrics.number, "none", "3", 0),
        (metrics.similarity, "# a comment\nreturn x\nreturn y", "return x", 1),
        # Nine of ten characters each: 2 x 9 / 20.
        (metrics.similarity, "\nreturn  xs", "return  xy", 0.9),
        (metrics.similarity, "``` only", "return", 0),
    ],
)
def test_scores_are_those_of_the_definition(score, prediction, truth, value):
    assert score(prediction, truth) == pytest.approx(value)


@pytest.mark.parametrize(
    ("prediction", "value"), [("Art history", 1), ("Art", 0), ("Art history or Law", 1 / 2), ("none", 0)]
)
def test_a_class_whose_name_is_part_of_the_right_one_is_not_held_against_it(prediction, value):
    assert metrics.classification(prediction, "Art history", ("Art", "Art history", "Law")) == value


def test_figures_of_tokens_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    dense, ours = (torch.randn(200, 17, generator=generator) for _ in range(2))
    following = torch.randint(0, 17, (200,), generator=generator)
    found = compare(dense, ours, following)
    p, q = dense.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    numpy.testing.assert_allclose(found.kl, kl, rtol=1e-9)
    numpy.testing.assert_allclose(found.loss, torch.nn.functional.nll_loss(q, following, reduction="none"), rtol=1e-12)
    numpy.testing.assert_allclose(found.dense_loss, torch.nn.functional.nll_loss(p, following, reduction="none"))
    assert found.same.mean() == (dense.argmax(-1) == ours.argmax(-1)).double().mean().item()
    same = compare(dense, dense, following)
    assert same.kl.max() == 0 and same.same.min() == 1


def tokens_of(difference: numpy.ndarray, common: numpy.ndarray | float = 2.0) -> Tokens:
    zero = numpy.zeros_like(difference)
    return Tokens(zero, zero + 1, zero + common + difference, zero + common)


def test_an_interval_is_as_wide_as_the_spread_of_its_blocks_and_is_paired():
    draw = numpy.random.default_rng(1)
    difference = draw.normal(0.01, 0.2, (32, 512))
    found = increase(tokens_of(difference))
    error = difference.reshape(-1, 64).mean(-1).std() / math.sqrt(difference.size // 64)
    assert found.mean == pytest.approx(math.expm1(difference.mean()))
    assert found.low == pytest.approx(math.expm1(difference.mean() - 1.96 * error), abs=0.15 * error)
    assert found.high == pytest.approx(math.expm1(difference.mean() + 1.96 * error), abs=0.15 * error)
    # What is hard for both models alike is no uncertainty of the difference.
    shared = increase(tokens_of(difference, draw.normal(2, 5, difference.shape)))
    assert shared.low == pytest.approx(found.low) and shared.high == pytest.approx(found.high)


def test_neighbours_that_are_alike_widen_an_interval():
    draw = numpy.random.default_rng(2)
    alike = numpy.repeat(draw.normal(0, 0.2, (16, 8)), 64, axis=1)
    alone = draw.permuted(alike.reshape(-1)).reshape(alike.shape)
    width = {name: increase(tokens_of(x)) for name, x in (("alike", alike), ("alone", alone))}
    assert width["alike"].high - width["alike"].low > 4 * (width["alone"].high - width["alone"].low)


def test_one_block_has_no_interval_and_blocks_cover_a_window():
    assert increase(tokens_of(numpy.zeros((1, 40)))).high == math.inf
    for scored in range(1, 2000, 7):
        size = block_size(scored)
        assert 1 <= size <= scored and scored % size < scored // size


def test_pieces_are_equal_chunks_behind_a_first_one():
    for length in range(1, 200):
        found = text.pieces(length, 16)
        assert sum(found.sizes) == length == found.total
        assert set(found.sizes[1:]) <= {16} and (found.first < 32)


def test_windows_begin_as_texts_do_and_are_spread_over_the_whole_text():
    document = "".join(chr(33 + at % 89) for at in range(1000))
    found = text.windows(Characters(first=7), document, 4, 101)
    assert found.shape == (4, 101) and found[:, 0].tolist() == [7] * 4
    assert Characters().decode(found[0, 1:].tolist()) == document[:100]
    assert Characters().decode(found[-1, 1:].tolist()) == document[-100:]
    assert len({tuple(window.tolist()) for window in found}) == 4


def test_a_text_that_is_too_short_says_how_much_there_is():
    with pytest.raises(ValueError, match=r"has 250 tokens, and windows=3 of context=100 need 300.*or windows=2"):
        text.windows(Characters(), "a" * 250, 3, 100)
    with pytest.raises(ValueError, match="or a context of at most 30"):
        text.windows(Characters(), "a" * 90, 3, 100)


@pytest.mark.parametrize("first", [None, 7])
def test_a_needle_lies_at_its_depth_and_a_prompt_has_its_length(first):
    whole = text.pieces(1024, 256)
    found = needle.needles(Characters(first), "straw " * 300, whole, None)
    assert [one.ids.numel() for one in found] == [512] * 5 + [768] * 5 + [1024] * 5
    for one in found:
        said = Characters().decode(one.ids.tolist())
        place = said.rpartition(" house in ")[2].removesuffix(" is")
        fact = f"The number of the house in {place} is{Characters().decode(one.answer.tolist())}."
        assert said.count(fact) == 1 and sum(one.sizes) == len(said) and said.count("The number of") == 5
        assert said.startswith(chr(7)) == (first is not None)
    depths = [at(one) for one in found[10:]]
    assert depths == sorted(depths) and depths[0] < 30 and depths[-1] > 700


def at(one: needle.Needle) -> int:
    """Where the fact that is asked for stands in its prompt."""
    said = Characters().decode(one.ids.tolist())
    place = said.rpartition(" house in ")[2].removesuffix(" is")
    return said.index(f"house in {place}")


def test_a_prompt_leaves_room_for_its_answer_and_a_haystack_for_its_needles():
    assert needle.lengths(text.pieces(1024, 256), 1024)[-1].total == 768
    with pytest.raises(ValueError, match="no room for 4 facts and a question"):
        needle.needles(Characters(), "straw", text.pieces(64, 16), None)
    with pytest.raises(ValueError, match="no room for an answer behind 512"):
        needle.needles(Characters(), "straw " * 99, text.pieces(512, 256), 512)


class Oracle:
    """Reads a needle's prompt and says its answer, but for the characters `wrong`."""

    def __init__(self, one: needle.Needle, wrong=()):
        self.answer, self.wrong, self.at = one.answer.tolist(), wrong, -1

    def new_cache(self):
        return None

    def last(self, ids, sizes, cache):
        return self.call(ids, cache)[-1]

    def call(self, ids, cache):
        self.at += 1
        assert self.at == 0 or ids.tolist() == [self.answer[self.at - 1]]
        logits = torch.zeros(1, 128)
        logits[0, 5 if self.at in self.wrong else self.answer[self.at]] = 9
        return logits


def test_a_needle_is_found_where_every_token_of_its_answer_is_the_likeliest():
    one = needle.needles(Characters(), "straw " * 300, text.pieces(1024, 256), None)[0]
    found, _ = needle.ask(Oracle(one), one)
    assert found.found and found.logprob == pytest.approx(-math.log1p(127 * math.exp(-9)))
    for wrong in range(len(one.answer)):
        lost, _ = needle.ask(Oracle(one, {wrong}), one)
        assert not lost.found and lost.logprob < found.logprob - 1


def row(name="a", mean=0.0, high=0.0, top1=1.0, needles=(), score=None, kl=0.0) -> Row:
    cells = [needle.Cell(0.0, 10, -1.0, found) for found in needles]
    answers = [] if score is None else [tasks.Answer("trec", "1", "", score)]
    quality = Quality(kl, kl, top1, 10.0, Increase(mean, mean, high))
    return Row(name, "k", "v", quality=quality, needle=cells, answers=answers)


FAILS = {
    "perplexity": row(high=0.0101),
    "top-1": row(top1=0.949),
    "1 needles lost": row(needles=(True, False, False)),
    "tasks 2.0 points lower": row(score=0.88),
    "not a number": row(high=math.nan),
}


@pytest.mark.parametrize("what", FAILS)
def test_each_limit_is_a_reason_to_say_no(what):
    dense = row(needles=(True, True, False)[: len(FAILS[what].needle)], score=0.9)
    bad = FAILS[what]
    bad.answers = bad.answers or dense.answers
    (found,) = failures(bad, dense, Threshold())
    assert what in found or what == "not a number"
    loose = Threshold(perplexity=2, top1=90, needle=1, tasks=3)
    assert bool(failures(bad, dense, loose)) == (what == "not a number")


def test_what_is_within_every_limit_is_safe_and_kl_counts_where_it_is_asked_for():
    good = row(high=0.0099, top1=0.951, needles=(True, True), score=0.895, kl=0.02)
    dense = row(needles=(True, False), score=0.9)
    assert not failures(good, dense, Threshold())
    assert failures(good, dense, Threshold(kl=0.01)) == ["KL 0.0200"]


def test_the_sentence_names_the_limits_that_were_measured_and_both_kinds():
    rows, dense = [row("good"), row("bad", top1=0.5), row("worse", high=math.inf)], row()
    failed = {one.name: failures(one, dense, Threshold()) for one in rows}
    said = sentence(rows, dense, failed, Threshold())
    assert "safe is good; not safe are bad (top-1 50.0%), worse (perplexity " in said
    assert "1 % or less" in said and "95 % or more" in said and "needle" not in said and "tasks" not in said
    assert said.count(".") - said.count("0.") <= 2 and said.endswith(".")
    assert "none of them is safe" in sentence(rows[1:], dense, failed, Threshold())


@pytest.mark.parametrize("item", ["top1", "top2=3", "top1=x", "top1=-1", "kl=inf", "kl=nan"])
def test_a_threshold_that_means_nothing_is_named(item):
    with pytest.raises(ValueError, match="is not NAME=NUMBER; names are perplexity, top1"):
        Threshold.parse([item])
    assert Threshold.parse(["top1=90%", "kl=0.5"]) == Threshold(top1=90, kl=0.5)


def test_a_choice_is_a_preset_a_codec_or_a_pair():
    assert choice("balanced").options == (("preset", "balanced"),)
    assert choice("q8_0").preset.pair == ("q8_0", "q8_0")
    assert choice("turboquant:4/q8_0").preset.pair == ("turboquant:4", "q8_0")
    assert [one.name for one in choices(["q8_0, small", "q8_0"])] == ["q8_0", "small"]
    with pytest.raises(ValueError, match="serves keys alone"):
        choice("qjl:2")
    with_extras = formats.Preset("turboquant:4", "q8_0", sinks=4, window=64, centre=True)
    assert choice("turboquant:4/q8_0+centre+window=64+sinks=4").preset == with_extras
    assert choice("small+window=0").preset == replace(formats.PRESETS["small"], window=0)
    for wrong in ("q8", "q8_0/", "a/b/c", "", "q8_0+", "q8_0+center", "q8_0+sinks", "q8_0+sinks=-1", "q8_0+centre=1"):
        with pytest.raises(ValueError, match="codecs '"):
            choice(wrong)


def test_a_choice_means_the_same_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "preset=small,keys=identity,sinks=9")
    assert choice("turboquant:4").preset == formats.Preset("turboquant:4", "turboquant:4")
    assert choice("tiny").preset == formats.PRESETS["tiny"]


def test_the_sample_is_ten_items_of_the_published_format():
    lines = [line for file in sorted(SAMPLE.glob("*.jsonl")) for line in file.read_text().splitlines()]
    fields = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
    assert len(lines) == 10 and all(json.loads(line).keys() == fields for line in lines)
    items = tasks.read(SAMPLE)
    assert len(items) == 10 and len({item.dataset for item in items}) == 7
    for item in items:
        assert item.score(item.answers[0]) == 1 and item.score("\nnothing of the kind 99") < 0.3


def test_published_prompts_and_lengths_are_taken_from_the_folder_and_long_prompts_lose_their_middle(tmp_path):
    item = {"input": "who?", "context": "x" * 100 + "y" * 100, "answers": ["me"], "dataset": "qasper"}
    (tmp_path / "any.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": "<{context}|{input}>"}))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps({"qasper": 10}))
    (read,) = tasks.read(tmp_path)
    assert read.prompt == f"<{'x' * 100}{'y' * 100}|who?>" and read.kind.most == 10
    ids, pieces = tasks.ids(read, Characters(first=7), 61, 16)
    assert Characters().decode(ids.tolist()) == "\x07<" + "x" * 24 + "y" * 19 + "|who?>" and pieces.total == 51


def test_a_line_that_is_no_item_is_named(tmp_path):
    file = tmp_path / "qasper.jsonl"
    for line, said in (
        ("{", "line 1 is no JSON object"),
        ('{"input": "", "context": ""}', "has no answers"),
        ('{"input": "", "context": "", "answers": [], "dataset": "trec"}', "has no answers"),
        ('{"input": "", "context": "", "answers": ["a"], "dataset": "dureader"}', "'dureader' has no score here"),
    ):
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=said):
            tasks.read(tmp_path)
    with pytest.raises(ValueError, match="is no folder with files"):
        tasks.read(tmp_path / "nowhere")
