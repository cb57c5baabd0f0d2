"""`python -m tqcompile validate`: tiny models and real weights in this process; what it says, and when it says no."""

import contextlib
import io
import json
import pathlib
import re
import sys

import numpy
import pytest
import torch
from checkpoints import save_characters
from transformers import AutoTokenizer, DynamicCache

from tqcompile import CompressedKV, formats
from tqcompile.__main__ import main
from tqcompile.options import ENVIRONMENT
from tqcompile.validate import Settings, Threshold, load, text, validate
from tqcompile.validate import run as running

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))

import figure
from smollm2 import packaged

WORDS = "the cat sat on the mat and said that all was well; then it went to sleep by the fire, as cats do. "
TEXT = "".join(f"{at}. {WORDS}" for at in range(40))
CONTEXT, CHUNK, WINDOWS = 512, 128, 2
FAST = ("--inner", "eager", "--context", CONTEXT, "--windows", WINDOWS)
ITEM = {"input": "where did it sleep?", "context": WORDS, "answers": ["by the fire"], "dataset": "qasper", "_id": "1"}


def command(*arguments):
    """Exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["validate", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_characters(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """Everything there is to measure, of three codecs: (exit status, text, JSON, page)."""
    place = tmp_path_factory.mktemp("ran")
    document, files = place / "text.txt", (place / "all.json", place / "page.html")
    document.write_text(TEXT)
    (place / "qasper.jsonl").write_text(json.dumps(ITEM) + "\n")
    (place / "dataset2maxlen.json").write_text('{"qasper": 4}')
    codecs = ("--codecs", "identity,turboquant:8", "turboquant:2", "--threshold", "tasks=100")
    more = ("--text", document, "--generate", 6, "--needle", "--tasks", place)
    status, said, _ = command(folder, *FAST, *codecs, *more, "--json", files[0], "--html", files[1])
    return status, said, json.loads(files[0].read_text()), files[1].read_text()


def rows(ran) -> dict[str, dict]:
    return {row["name"]: row for row in (ran[2]["dense"], *ran[2]["rows"])}


def test_it_says_yes_and_no_and_ends_in_one_sentence(ran):
    status, said, found, _ = ran
    assert status == 1 and found["safe"] == ["identity", "turboquant:8"]
    last = " ".join(said.split("\n\n")[-1].split())
    assert last == found["verdict"]
    assert "safe are identity, turboquant:8; not safe is turboquant:2 (perplexity " in last
    (failures,) = (row["failures"] for row in found["rows"] if row["name"] == "turboquant:2")
    assert len(failures) == 2 and failures[1].startswith("top-1 ")


def test_bits_and_bytes_are_those_of_live_caches(ran):
    found = rows(ran)
    # 2 layers of 2 heads, keys and values of 32 numbers; a scalar of 16 bits for each vector.
    numbers = 2 * 2 * 2 * 32 * CONTEXT
    for name, bits in (("dense", 32), ("identity", 32), ("turboquant:8", 8.5), ("turboquant:2", 2.5)):
        size = found[name]["size"]
        assert found[name]["bits"] == bits and size["elements"] == numbers and size["held_bytes"] == bits * numbers / 8
        assert size["held_bytes"] <= size["live_bytes"] < 1.2 * size["held_bytes"]
    assert f"{found['turboquant:2']['size']['live_bytes']:,}" in ran[1]


def test_less_bits_cost_more_and_none_are_lost_without_loss(ran):
    found = rows(ran)
    exact, eight, two = (found[name] for name in ("identity", "turboquant:8", "turboquant:2"))
    assert exact["kl"] < 1e-9 and exact["top1"] == 1 and max(exact["damage_keys"]) == 0
    assert abs(exact["quality"]["increase"]["high"]) < 1e-6 and exact["greedy"] == [6] * WINDOWS
    assert exact["answers"] == found["dense"]["answers"]
    assert 1e-5 < eight["kl"] < two["kl"] / 100 and eight["kl"] < eight["kl99"]
    increase = two["quality"]["increase"]
    assert increase["low"] < increase["mean"] < increase["high"]
    assert two["perplexity"] / found["dense"]["perplexity"] == pytest.approx(1 + increase["mean"])
    for mine, theirs in zip(exact["needle"], found["dense"]["needle"], strict=True):
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
    assert len(exact["needle"]) == 15


class Coded(DynamicCache):
    """What compiled code does to a cache, in eager code: exact in the call that fills it, codes from then on."""

    def __init__(self, config, codec):
        super().__init__(config=config)
        self.codec = codec

    def update(self, keys, values, layer, *args, **kwargs):
        is_first = self.get_seq_length(layer) == 0
        coded = [CompressedKV.encode(x, self.codec).decode() for x in (keys, values)]
        found = super().update(*coded, layer, *args, **kwargs)
        return (keys, values) if is_first else found


@pytest.mark.parametrize("name", ["turboquant:8", "turboquant:2"])
def test_every_scored_token_was_predicted_over_codes_alone(ran, folder, name):
    """The same figures as those of an uncompiled model over a cache that went through the codec."""
    model, tokenizer = load.load(str(folder), torch.device("cpu"))
    kl, same, losses, damage = [], [], [], torch.zeros(2, 2, 2)
    with torch.no_grad():
        for window in text.windows(tokenizer, TEXT, WINDOWS, CONTEXT):
            cache = Coded(model.config, formats.codec(name))
            ours = torch.cat([model(x[None], past_key_values=cache).logits[0] for x in window.split(CHUNK)])
            exact = DynamicCache(config=model.config)
            dense = model(window[None], past_key_values=exact).logits[0]
            p, q = (x[CHUNK:-1].double().log_softmax(-1) for x in (dense, ours))
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
            losses.append([torch.nn.functional.nll_loss(x, window[CHUNK + 1 :]) for x in (p, q)])
            for layer in range(2):
                for side, part in enumerate(("keys", "values")):
                    x, y = (getattr(c.layers[layer], part)[:, :, :CHUNK] for c in (exact, cache))
                    damage[side, layer] += torch.stack([(x - y).square().sum(), x.square().sum()])
    found = rows(ran)[name]
    assert found["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)
    assert found["kl99"] == pytest.approx(numpy.quantile(torch.cat(kl).numpy(), 0.99), rel=1e-3)
    assert found["top1"] == pytest.approx(torch.cat(same).double().mean().item(), abs=2e-3)
    perplexities = torch.tensor(losses).mean(0).exp().tolist()
    assert [rows(ran)["dense"]["perplexity"], found["perplexity"]] == pytest.approx(perplexities, rel=1e-4)
    expected = damage[..., 0] / damage[..., 1]
    assert found["damage_keys"] == pytest.approx(expected[0].tolist(), rel=1e-3)
    assert found["damage_values"] == pytest.approx(expected[1].tolist(), rel=1e-3)


def test_tables_line_up_and_the_page_holds_what_it_shows(ran):
    _, said, found, page = ran
    for block in said.split("\n\n"):
        lines = block.splitlines()
        if len(lines) > 2 and set(lines[2]) == {"-", " "}:
            body = [line for line in lines[1:] if not line.startswith("Mean")]
            assert len({len(line) for line in body if len(line) == len(lines[2])}) == 1 and max(map(len, body)) <= 160
    assert page.count("data:image/svg+xml;base64,") == 4 and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "<strong>Safe means here" in page and page.rstrip().endswith("</html>")
    for name in rows(ran):
        assert f"<td>{name}</td>" in page
    assert figure.draw(found, {}).axes[0].get_title().endswith(found["setting"])
    assert "95 % percentile interval of a paired bootstrap" in said and found["dense"]["tasks"].keys() == {"qasper"}


def small(folder, codecs, **settings):
    model, tokenizer = load.load(str(folder), torch.device("cpu"))
    chosen = Settings(context=32, windows=2, generate=0, inner="eager", **settings)
    return model, validate(model, tokenizer, TEXT, codecs, chosen)


def test_windows_beside_each_other_give_what_they_give_alone(folder):
    names = ["turboquant:8", "turboquant:2+centre+sinks=2+window=8"]
    alone, beside = (small(folder, names, prefill=20, chunk=4, batch=batch)[1] for batch in (1, 2))
    for one, two in zip((alone.dense, *alone.rows), (beside.dense, *beside.rows)):
        assert two.size.bits == pytest.approx(one.size.bits, rel=0.02) and two.size.elements == 2 * one.size.elements
        assert two.quality.perplexity == pytest.approx(one.quality.perplexity, rel=1e-3)
        assert two.quality.kl == pytest.approx(one.quality.kl, rel=0.02, abs=1e-12)
        assert two.damage_keys == pytest.approx(one.damage_keys, rel=1e-3)
    assert alone.rows[1].extras == "first 2 and last 8 tokens exact, keys centred" and not alone.rows[0].extras


def test_a_window_is_worth_more_to_few_tokens_at_a_time(folder):
    """The first of many see their neighbours as codes."""
    kl = {}
    for chunk in (2, 12):
        _, found = small(folder, ["turboquant:2", "turboquant:2+window=8"], prefill=20, chunk=chunk)
        plain, window = (row.quality.kl for row in found.rows)
        kl[chunk] = window / plain
    assert kl[2] < kl[12]


def test_a_cache_that_stayed_dense_is_never_safe(folder, monkeypatch):
    """Its figures are perfect: they are the dense cache's."""
    monkeypatch.setenv(ENVIRONMENT, "disable=canonicalize")
    _, found = small(folder, ["turboquant:2"])
    (row,) = found.rows
    assert row.quality.top1 == 1 and row.dense_caches
    assert not found.safe and "a cache stayed dense" in found.verdict


def test_a_run_that_stops_is_a_row_of_its_own_and_the_model_is_as_it_was(folder, monkeypatch):
    def broken(**options):
        if options["keys"] == "turboquant:2":
            raise RuntimeError("no such luck")
        return turboquant(**options)

    turboquant = running.turboquant
    monkeypatch.setattr(running, "turboquant", broken)
    model, found = small(folder, ["turboquant:2", "q8_0"], threshold=Threshold(perplexity=100, top1=0))
    assert found.safe == ["q8_0"] and found.rows[0].quality is None
    assert "its run stopped: RuntimeError: no such luck" in found.verdict
    assert "forward" not in vars(model) and not model.training


MISTAKES = {
    "an unknown codec": (("--codecs", "turboqant:4"), "did you mean 'turboquant:4'"),
    "a pair of three": (("--codecs", "a/b/c"), "is not KEYS/VALUES"),
    "an unknown limit": (("--threshold", "top=3"), "is not NAME=NUMBER"),
    "no such text": (("--text", "nowhere.txt"), "--text nowhere.txt cannot be read"),
    "no such folder of tasks": (("--tasks", "nowhere"), "--tasks nowhere is no folder"),
    "a page nowhere": (("--html", "nowhere/page.html"), "there is no folder nowhere"),
    "more than the model reads": (("--context", "4096"), "this model reads 1024 tokens"),
    "a chunk that leaves nothing": (("--context", "64", "--chunk", "40"), "a chunk from 2 to 32"),
    "more windows than text": (("--windows", "100000"), "the text has "),
    "a device that is none": (("--device", "abacus"), "--device abacus cannot be used"),
    "too short for needles": (("--context", "64", "--needle"), "have no room for 4 facts"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_in_one_line(mistake, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given, words = MISTAKES[mistake]
    with pytest.raises(SystemExit) as end:
        main(["validate", str(folder), *given])
    said = capsys.readouterr().err
    assert end.value.code == 2 and words in said and len(said.strip().splitlines()) == 1


def test_a_folder_without_a_model_or_a_tokenizer_says_so(folder, tmp_path):
    place = torch.device("cpu")
    with pytest.raises(ValueError, match="there is no such folder"):
        load.load(str(tmp_path / "nowhere"), place)
    with pytest.raises(ValueError, match="has no tokenizer to read"):
        load.load(str(tmp_path), place)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no model to read"):
        load.load(str(tmp_path), place)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds 2 files \.gguf; name one of them"):
        load.load(str(tmp_path), place)
    with pytest.raises(TypeError, match="give a model, not its name"):
        validate(str(folder), None)


def test_real_weights_pass_with_eight_bits_and_fail_with_one():
    """SmolLM2-135M-Instruct, the packaged weights, found by their folder."""
    model, tokenizer = load.load(str(packaged()[0]), torch.device("cpu"))
    chosen = Settings(context=128, chunk=64, windows=6, generate=0, inner="eager")
    found = validate(model, tokenizer, None, ["turboquant:8", "turboquant:1"], chosen)
    eight, one = found.rows
    assert found.safe == ["turboquant:8"], found.verdict
    assert 10 < found.dense.quality.perplexity < 25 and eight.quality.kl < 0.001 < 0.5 < one.quality.kl
    assert one.quality.increase.low > 0.5 and one.quality.top1 < 0.7
    assert len(eight.damage_keys) == 30 and max(eight.damage_values) < 1e-4 < 0.3 < min(one.damage_values)
