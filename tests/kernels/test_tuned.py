"""Settings that a search found: kept on disk, read once, and never believed where anything is another."""

import json
from dataclasses import replace

import pytest
import torch

from tqcompile import formats
from tqcompile.coding import split
from tqcompile.kernels import emit, integer, logits, placement, tune, tuned
from tqcompile.layout import layout_of

CPU = torch.device("cpu")
CODEC = formats.codec("turboquant:4")
KERNELS = {
    "attend": (integer, (integer.sides_of((CODEC, CODEC), (128, 128)), True)),
    "logits": (logits, logits.side_of(CODEC, 128)),
}
ROWS, HEADS, LENGTH = 4, 8, 30000
UNUSUAL = tune.Setting(8, 32, 3, 77)


def forget():
    """What a new process knows."""
    tuned._found.clear()
    tuned.forget()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(emit, "default_folder", lambda: tmp_path)
    forget()
    yield tmp_path
    forget()


def plan(task="attend", rows=ROWS, heads=HEADS, length=LENGTH):
    module, kernel = KERNELS[task]
    return module.plan_of(kernel, rows, heads, length, CPU)


def used(task="attend", **sizes):
    found = plan(task, **sizes)
    return found.block_rows, found.block_tokens, found.registers


def search(task="attend", best=UNUSUAL):
    """Search with a timer that finds `best` fastest, and says which plan each launch had."""
    module, kernel = KERNELS[task]
    key, default = module.choice_of(kernel, ROWS, HEADS, LENGTH, CPU)
    settings, seen = (default, best, *tune.SETTINGS[task]), []

    def milliseconds():
        seen.append(used(task))
        return 1.0 if seen[-1] == used_by(best) else 2.0

    times = tuned.search(key, dict.fromkeys(settings), milliseconds)
    assert seen == [used_by(setting) for setting in dict.fromkeys(settings)]
    return key, times


def used_by(setting):
    return setting.block_rows, setting.block_tokens, setting.registers


@pytest.mark.parametrize("task", KERNELS)
def test_the_fastest_setting_is_used_from_then_on_and_by_other_processes(task):
    before = used(task)
    _, times = search(task)
    assert before != used(task) == used_by(UNUSUAL) and times[UNUSUAL] == 1.0
    forget()
    assert used(task) == used_by(UNUSUAL)
    # As many programs as the setting says share the tokens: one row block of each of eight heads.
    assert plan(task).splits == tune.DEFAULT_PROCESSORS * UNUSUAL.programs // HEADS


def test_what_is_launched_follows_a_search():
    planes = layout_of(CODEC, 128, torch.bfloat16, "cpu").allocate((1, HEADS, LENGTH), CPU)
    lie = placement.laid((torch.empty(1, ROWS * HEADS, 1, 128), *split(CODEC, planes), *split(CODEC, planes)))
    given = (CODEC, CODEC), (128, 128), (0.1, emit.Reader(), None), lie, (0, 0, 0, 0), (0, 0), (None, None)
    before, seen = integer.prepared(*given), []
    assert integer.prepared(*given) is before

    def registers():
        seen.append(integer.prepared(*given).call.options["maxnreg"])
        return 1.0 if seen[-1] == UNUSUAL.registers else 2.0

    key, default = integer.choice_of(KERNELS["attend"][1], ROWS, HEADS, LENGTH, CPU)
    tuned.search(key, (default, UNUSUAL), registers)
    assert seen == [default.registers, UNUSUAL.registers]
    after = integer.prepared(*given)
    assert (after.sizes.splits, after.call.options["maxnreg"]) == (plan().splits, UNUSUAL.registers)
    assert before.sizes.splits != after.sizes.splits


def test_a_setting_of_one_kernel_is_none_of_another():
    search("attend")
    forget()
    assert used("logits") != used_by(UNUSUAL)


def test_a_file_is_read_once_a_process_whatever_the_length_grows_to(monkeypatch):
    search()
    forget()
    reads, read = [], tuned._read
    monkeypatch.setattr(tuned, "_read", lambda key: reads.append(key) or read(key))
    assert {used(length=length) for length in range(2**14 + 1, 2**15 + 1, 100)} == {used_by(UNUSUAL)}
    assert len(reads) == 1


@pytest.mark.parametrize("other", [{"rows": 3}, {"heads": 9}, {"length": 2**15 + 1}, {"length": 2**14}], ids=str)
def test_other_sizes_keep_their_defaults(other):
    search()
    forget()
    assert used(**other) != used_by(UNUSUAL)


@pytest.mark.parametrize(
    "name, value",
    [("__version__", "0.0"), ("device_of", lambda device: ("another", "9.0")), ("source", lambda *a: "new")],
)
def test_another_triton_device_or_kernel_finds_nothing(name, value, monkeypatch):
    search()
    forget()
    place = {"__version__": tuned.triton, "device_of": tuned, "source": integer}[name]
    monkeypatch.setattr(place, name, value)
    assert used() != used_by(UNUSUAL)


BROKEN = {
    "no JSON": lambda content: "{",
    "no text": lambda content: b"\xff\xfe\x00",
    "another key": lambda content: json.dumps(content | {"key": content["key"] | {"rows": 3}}),
    "a list": lambda content: "[]",
    "no setting": lambda content: json.dumps({"key": content["key"]}),
    "a tile that no kernel has": lambda content: json.dumps(
        content | {"setting": vars(UNUSUAL) | {"block_tokens": 48}}
    ),
    "a fraction": lambda content: json.dumps(content | {"setting": vars(UNUSUAL) | {"block_rows": 4.0}}),
    "a word too many": lambda content: json.dumps(content | {"setting": vars(UNUSUAL) | {"warps": 1}}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_or_foreign_file_is_named_and_ignored(how):
    before = used()
    key, _ = search()
    text = BROKEN[how](json.loads(key.path.read_text()))
    key.path.write_bytes(text if isinstance(text, bytes) else text.encode())
    forget()
    with pytest.warns(UserWarning, match=f"{key.path} is no setting .* and is ignored"):
        assert used() == before


def test_a_search_that_fails_leaves_nothing(folder):
    before, (module, kernel) = used(), KERNELS["attend"]
    key, _ = module.choice_of(kernel, ROWS, HEADS, LENGTH, CPU)
    with pytest.raises(ZeroDivisionError):
        tuned.search(key, [UNUSUAL], lambda: 1 / 0)
    assert used() == before and not list(folder.iterdir())


def test_a_plan_searches_nothing_and_writes_nothing(folder):
    assert used() == used_by(integer.choice_of(KERNELS["attend"][1], ROWS, HEADS, LENGTH, CPU)[1])
    assert not list(folder.iterdir())


def test_a_setting_refuses_what_no_kernel_runs_with():
    with pytest.raises(ValueError, match="block_rows=5; allowed are"):
        replace(UNUSUAL, block_rows=5)
