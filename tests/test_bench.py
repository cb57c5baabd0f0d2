"""`python -m tqcompile bench`, in this process and at tiny shapes: what it prints, keeps, compares and refuses."""

import argparse
import json
import re

import pytest
import torch

from tqcompile import cpu, formats, ops
from tqcompile.__main__ import main
from tqcompile.bench import check, clock, compressed, request
from tqcompile.bench.rows import read
from tqcompile.bench.shapes import LONG, MASKS, TASKS, Case, Shape, suite

SHAPE = ("--batch", 2, "--context", 40, "--heads", 4, "--kv-heads", 2, "--head-dim", 32, "--layers", 1)
FAST = ("--device", "cpu", "--inner", "eager", "--steps", 1)
PAIR = ("--keys", "turboquant:4", "--values", "q8_0")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Buffers that take no time to fill: no test looks at a time."""
    monkeypatch.setattr(clock, "ROTATED_BYTES", 2**16)
    monkeypatch.setattr(clock, "COPIED_BYTES", {"cpu": 2**16})
    monkeypatch.setattr("tqcompile.bench.decoder.VOCABULARY", 64)


def bench(*arguments):
    return main(["bench", *map(str, arguments)])


def complaint(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        bench(*arguments)
    assert end.value.code == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_a_shape_of_ones_own_gets_a_row_for_each_task(capsys, tmp_path):
    file, drawing = tmp_path / "rows.json", tmp_path / "times.svg"
    assert bench(*SHAPE, *FAST, *PAIR, "--json", file, "--plot", drawing) == 0
    shown = capsys.readouterr().out
    assert shown.count("turboquant:4 / q8_0") == len(read(file)) + 5
    for words in (
        "attention of one query",
        "queries times keys",
        "appending one token",
        "encoding the context",
        "a whole decode step",
    ):
        assert words in shown
    found = {(row.case.task, row.case.shape.context): row for row in read(file)}
    assert set(found) == {("attend", context) for context in (2, 5, 10, 20)} | {(task, 40) for task in TASKS}
    # Two sequences, two heads, 40 tokens: 16 bytes of codes and one scalar for keys; 32 and one scalar for values.
    for task in ("attend", "append", "prefill", "step"):
        assert found[task, 40].compressed_bytes == 2 * 2 * 40 * (16 + 2 + 32 + 2)
        assert found[task, 40].dense_bytes == 2 * 2 * 40 * 2 * 32 * 4
    # Scores are of keys alone.
    assert found["logits", 40].compressed_bytes == 2 * 2 * 40 * (16 + 2)
    assert found["logits", 40].dense_bytes == 2 * 2 * 40 * 32 * 4
    assert drawing.read_text().startswith("<?xml")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 3])
def test_masks_and_several_queries_are_measured(mask, queries, capsys):
    assert bench(*SHAPE, *FAST, *PAIR, "--tasks", "attend", "logits", "--mask", mask, "--queries", queries) == 0
    shown, scores = capsys.readouterr().out.split("queries times keys")
    scores = scores.split("dense:")[0]
    assert f"{mask} mask" not in scores and ("3 queries" in scores) == (queries > 1)
    assert (f"{mask} mask" in shown) == (mask != "none") and (f"{queries} queries" in shown) == (queries > 1)


@pytest.mark.parametrize("mask", MASKS)
def test_a_cache_that_is_filled_in_part(mask, capsys, tmp_path):
    file = tmp_path / "rows.json"
    tasks = "--tasks", "attend", "append"
    assert bench(*SHAPE, *FAST, *PAIR, *tasks, "--mask", mask, "--filled", 10, "--json", file) == 0
    assert "B2 x 40, 10 filled, 4/2 heads" in capsys.readouterr().out
    part, other = read(file)
    assert (part.case.shape.filled, other.case.shape.filled, other.case.shape.mask) == (10, 0, "none")
    seen = compressed.mask_of(part.case.shape, torch.float32, torch.device("cpu"))
    seen = (seen == 0) if mask == "additive" else seen
    assert seen.sum() == (2 * 10 if mask == "none" else 2 * 9) and not seen[..., 10:].any()
    _, size, moved = compressed.attend(part.case, torch.float32, torch.device("cpu"))
    assert moved == size * 10 // 40


def test_each_number_of_queries_gets_a_row_where_a_task_has_any(capsys, tmp_path):
    file = tmp_path / "rows.json"
    assert bench(*SHAPE, *FAST, *PAIR, "--tasks", "attend", "append", "--queries", 3, 1, 3, "--json", file) == 0
    assert [(row.case.task, row.case.shape.queries) for row in read(file)] == [
        ("attend", 1),
        ("attend", 3),
        ("append", 1),
    ]
    assert "3 queries" not in capsys.readouterr().out.split("streams that fit")[1]
    drawn = tmp_path / "times.svg"
    assert "leave all but one of --queries [1, 3] out" in complaint(capsys, *SHAPE, "--queries", 3, 1, "--plot", drawn)


def test_caps_and_sinks_are_measured(capsys):
    assert bench(*SHAPE, *FAST, *PAIR, "--tasks", "attend", "--softcap", "30", "--sinks") == 0
    assert "softcap 30, sinks" in capsys.readouterr().out


MEASURED: list[str] = []


@pytest.fixture
def kept(tmp_path):
    """Rows that are measured once; each test gets a file of its own, which it may change."""
    file = tmp_path / "rows.json"
    if not MEASURED:
        bench(*SHAPE, *FAST, *PAIR, "--tasks", "attend", "logits", "append", "--json", file)
        MEASURED.append(file.read_text())
    file.write_text(MEASURED[0])
    return file


def scaled(file, factor):
    content = json.loads(file.read_text())
    for row in content["rows"]:
        for part in row["dense"]:
            row["dense"][part] *= factor
    file.write_text(json.dumps(content))


def test_a_check_measures_the_rows_of_a_file_and_fails_where_a_ratio_fell(kept, capsys):
    # Far beyond what times differ by on a busy machine.
    scaled(kept, 1e-4)
    assert bench("--device", "cpu", "--check", kept) == 0
    assert "0 of 3 rows are slower" in capsys.readouterr().out
    scaled(kept, 1e8)
    assert bench("--device", "cpu", "--check", kept) == 1
    shown = capsys.readouterr().out
    assert "3 of 3 rows are slower by more than 5 %" in shown
    assert len(re.findall(r" slower$", shown, re.M)) == 3


def test_a_doubled_ratio_is_a_regression_and_a_lower_one_is_none(kept):
    from dataclasses import replace

    from tqcompile.bench.clock import Sample
    from tqcompile.bench.rows import compare

    old = read(kept)
    doubled = [replace(row, dense=Sample(*(2 * part for part in vars(row.dense).values()))) for row in old]
    assert compare(doubled, old, 5, "simple")[1] == old
    assert compare(old, doubled, 5, "simple")[1] == []
    assert compare(old, old, 0, "simple")[1] == []


def test_a_file_keeps_the_rows_of_other_cases(kept):
    bench(*SHAPE, *FAST, *PAIR, "--tasks", "prefill", "append", "--json", kept)
    assert [row.case.task for row in read(kept)] == ["attend", "logits", "append", "prefill"]


def test_rows_of_another_device_are_no_bar(kept, capsys):
    kept.write_text(kept.read_text().replace(clock.device_name(torch.device("cpu")), "a slide rule"))
    assert "was measured on 'a slide rule'" in complaint(capsys, "--device", "cpu", "--check", kept)


BROKEN = {
    ("attend", "attend"): lambda real: lambda *arguments: real(*arguments) * 1.05,
    ("logits", "logits"): lambda real: lambda *arguments: real(*arguments) * 1.05,
    ("append", "append_step"): lambda real: lambda keys, values, k, v, *rest: real(keys, values, k, -v, *rest),
    ("prefill", "append"): lambda real: lambda planes, y, *rest: real(planes, -y, *rest),
}


@pytest.mark.parametrize(("task", "name"), BROKEN, ids=str)
def test_a_wrong_result_gets_no_time(task, name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ops, name, BROKEN[task, name](getattr(ops, name)))
    file = tmp_path / "rows.json"
    assert bench(*SHAPE, *FAST, *PAIR, "--tasks", task, "--json", file) == 1
    shown = capsys.readouterr().out
    assert "is off by" in shown and "its time is not shown" in shown
    assert not file.exists()


def test_a_step_that_left_its_caches_dense_gets_no_time(monkeypatch, capsys):
    monkeypatch.setattr("tqcompile.bench.steps.turboquant", lambda **codecs: "eager")
    assert bench(*SHAPE, *FAST, *PAIR, "--tasks", "step") == 1
    assert "2 of 2 caches" in capsys.readouterr().out


def test_no_number_is_close_to_nothing():
    assert check.distance(torch.tensor([torch.nan, 1]), torch.ones(2)) == float("inf")


def test_a_model_is_measured_from_its_configuration_alone(tmp_path, capsys):
    from transformers import LlamaConfig

    facts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    LlamaConfig(hidden_size=64, intermediate_size=64, vocab_size=64, **facts).save_pretrained(tmp_path)
    file = tmp_path / "rows.json"
    model = ("--model", tmp_path, "--context", 40, "--tasks", "attend", "step", "--json", file)
    assert bench(*model, *FAST, *PAIR) == 0
    attention, step = read(file)
    assert attention.case.shape == step.case.shape == Shape(1, 40, 4, 2, 16)
    assert step.case.layers == 2 and "Hugging Face" in step.rival
    assert "2 layers" in capsys.readouterr().out


def test_scores_are_moved_beside_the_keys():
    case = Case("logits", Shape(2, 40, 4, 2, 32), "turboquant:4", "q8_0", "float32")
    _, size, moved = compressed.logits(case, torch.float32, torch.device("cpu"))
    assert size == 2 * 2 * 40 * (16 + 2) and moved == size + 2 * 4 * 40 * 4


def test_the_suite_measures_every_codec_and_no_row_twice():
    plan = suite()
    assert len(set(plan)) == len(plan)
    assert {case.task for case in plan} == set(TASKS)
    scores = [case for case in plan if case.task == "logits"]
    assert [case.keys for case in scores] == ["turboquant:4", "turboquant:3"]
    assert {(case.shape, case.dtype) for case in scores} == {(Shape(1, 131072), "float32")}
    assert {case.keys for case in plan if case.shape == LONG} == set(formats.REGISTRY)


@pytest.mark.parametrize("task", ["append", "prefill"])
def test_what_no_kernel_writes_is_said_not_to_be_timed_by_itself_on_a_gpu(task):
    case = Case(task, Shape(1, 64), "turboquant_prod:3", "turboquant:3")
    with pytest.raises(compressed.NoKernel, match=f"{task} of B1 x 64.*turboquant_prod:3.*--tasks step"):
        compressed.require_kernel(case, torch.device("cuda"))
    compressed.require_kernel(case, torch.device("cpu"))
    assert all(ops.writes(formats.codec(name), 128) for c in suite() if c.task == task for name in (c.keys, c.values))


@pytest.mark.parametrize("pair", sorted({(c.keys, c.values) for c in suite() if c.shape == LONG}), ids="/".join)
def test_any_pair_of_the_suite_can_be_measured(pair, monkeypatch):
    monkeypatch.setattr(cpu, "_compile_rows", None)
    for task in ("attend", "append"):
        _, size, _ = getattr(compressed, task)(
            Case(task, Shape(2, 20, 4, 2, 64), *pair, "float32"), torch.float32, torch.device("cpu")
        )
        assert size > 0


WRONG = {
    "no codec": (("--codec", "turboqant:4"), "--codec: codec 'turboqant:4' does not exist; did you mean"),
    "no key codec": (("--keys", "q8"), "--keys: codec 'q8' does not exist; did you mean 'q8_0'?"),
    "values of what serves keys": (("--values", "qjl:1"), "--values: codec 'qjl:1' serves keys alone"),
    "both of what serves keys": (("--codec", "qjl:1"), "--codec: codec 'qjl:1' serves keys alone"),
    "heads": (("--heads", 6, "--kv-heads", 4), "heads=6 is no multiple of kv_heads=4"),
    "more filled than there is": (("--context", 9, "--filled", 10), "filled=10 of context=9; give a number of tokens"),
    "no tokens": (("--context", 0), "'0' is not a whole number of 1 or more"),
    "weights": (("--weights", "many"), "'many' is no number of bytes; examples are 15GiB"),
    "tolerance": (("--tolerance", "-1"), "'-1' is not a number from 0 to 100"),
    "a model that is nowhere": (("--model", "./nowhere"), "--model ./nowhere has no configuration to read"),
    "two shapes": (("--model", "./nowhere", "--heads", 4), "says its own shape; leave out --heads"),
    "a suite and a shape": (("--suite", "--batch", 4), "--suite says itself what is measured; leave out --batch"),
    "a suite on a CPU": (("--suite",), "--suite measures shapes of a GPU"),
    "no folder": (("--json", "./nowhere/rows.json"), "there is no folder nowhere"),
    "no drawing": (("--plot", "times.xyz"), "--plot times.xyz: the ending is no format of a figure"),
    "nothing to draw": (("--plot", "times.svg", "--tasks", "step"), "--plot draws attention"),
    "no file": (("--check", "nowhere.json"), "nowhere.json cannot be read"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named(mistake, capsys):
    arguments, words = WRONG[mistake]
    assert words in complaint(capsys, "--device", "cpu", *arguments)


def test_a_file_of_something_else_is_named(tmp_path, capsys):
    (tmp_path / "rows.json").write_text("{}")
    assert "holds no rows that `bench --json` wrote" in complaint(capsys, "--check", tmp_path / "rows.json")


@pytest.mark.parametrize("text, number", [("15GiB", 15 * 2**30), ("16e9", 16 * 10**9), ("1.5MB", 1500000), ("7", 7)])
def test_bytes_are_read_as_people_write_them(text, number):
    assert request.size(text) == number


@pytest.mark.parametrize("text, number", [("32K", 32768), ("1K", 1024), ("3000", 3000)])
def test_tokens_are_read_as_tables_have_them(text, number):
    assert request.tokens(text) == number
    for wrong in (f"-{text}", "K", "0K", "1.5K", "1KK", "1k"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            request.tokens(wrong)


def test_a_case_refuses_what_no_row_can_be_of():
    with pytest.raises(ValueError, match="layers=0; a step needs one or more"):
        Case("step", Shape(1, 8), "q8_0", "q8_0")
    with pytest.raises(argparse.ArgumentTypeError):
        request.percent("101")
