"""`python -m tqcompile tune`, without a GPU: what it searches, prints, keeps and refuses."""

import pytest
import torch

from tqcompile import formats
from tqcompile.__main__ import main
from tqcompile.bench import compressed, tune
from tqcompile.bench.check import WrongResult
from tqcompile.bench.clock import Sample
from tqcompile.coding import split
from tqcompile.kernels import emit, integer, placement, tuned
from tqcompile.kernels import tune as settings
from tqcompile.layout import layout_of

SHAPE = ("--batch", "2", "--context", "3000", "--heads", "8", "--kv-heads", "2", "--head-dim", "64")


@pytest.fixture(autouse=True)
def timed(tmp_path, monkeypatch):
    """Times that grow, of a CPU that searches as a GPU does; gives the cases that were timed."""
    cases = []

    def of(case, dtype, device):
        cases.append(case)
        return Sample(*[float(len(cases))] * 3), 0, 0

    monkeypatch.setattr(emit, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(tune, "device", lambda: torch.device("cpu"))
    for task in ("attend", "logits"):
        monkeypatch.setattr(compressed, task, of)
    yield cases
    tuned._found.clear()
    tuned.forget()


def complaint(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["tune", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_attention_and_scores_are_searched_and_kept(timed, tmp_path, capsys):
    assert main(["tune", *SHAPE, "--codec", "turboquant:4"]) == 0
    shown = capsys.readouterr().out
    assert {case.task for case in timed} == {"attend", "logits"}
    assert {(case.shape.batch, case.shape.context, case.shape.head_dim) for case in timed} == {(2, 3000, 64)}
    assert len(list(tmp_path.glob("tuned_*.json"))) == 2 and shown.count("kept in") == 2
    # The first is what is done without a search, and times grow.
    assert shown.count("fastest without a search") == 2


def test_each_context_is_searched_by_itself(timed, tmp_path):
    assert main(["tune", *SHAPE, "--context", "1024", "2048", "--codec", "turboquant:3"]) == 0
    assert {case.shape.context for case in timed} == {1024, 2048}
    assert len(list(tmp_path.glob("tuned_*.json"))) == 4


@pytest.mark.parametrize(("context", "room"), [(3008, True), (3008, False), (3000, True)])
def test_what_is_kept_is_what_a_launch_over_such_planes_asks_for(timed, monkeypatch, context, room):
    monkeypatch.setattr(settings, "ring_tokens", lambda *a: 64 if room else 0)
    assert main(["tune", *SHAPE, "--context", str(context), "--codec", "turboquant:4"]) == 0
    codec, device = formats.codec("turboquant:4"), torch.device("cpu")
    codes, scale = split(codec, layout_of(codec, 64, torch.bfloat16, "cpu").allocate((2, 2, context), device))
    sides = integer.sides_of((codec, codec), (64, 64))
    kernel = sides, placement.in_ring(sides, (codes,) * 2, (scale,) * 2, device)
    assert kernel[1] == room
    assert integer.choice_of(kernel, 4, 4, context, device)[0].path.exists()


def test_values_without_a_kernel_leave_scores_to_search(timed):
    assert main(["tune", *SHAPE, "--keys", "turboquant:4", "--values", "turboquant:8"]) == 0
    assert {case.task for case in timed} == {"logits"}


def test_a_wrong_result_keeps_nothing(monkeypatch, tmp_path, capsys):
    def wrong(*arguments):
        raise WrongResult("attention is off by 0.5")

    monkeypatch.setattr(compressed, "attend", wrong)
    assert main(["tune", *SHAPE, "--codec", "turboquant:4"]) == 1
    assert "not searched: attention is off by 0.5" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_searched_is_said(monkeypatch, capsys):
    assert "there is nothing to choose" in complaint(capsys, *SHAPE, "--codec", "turboquant:8")
    assert "heads=6 is no multiple of kv_heads=4" in complaint(capsys, "--heads", "6", "--kv-heads", "4")
    assert "did you mean 'q8_0'" in complaint(capsys, "--codec", "q8")


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA device here" in complaint(capsys, *SHAPE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    assert integer.CAPABILITY > (7, 5) and "A card has no int8 matrix units" in complaint(capsys, *SHAPE)
