"""The sweep over architectures: tiny models, what is recorded of them, and that nothing wrong passes for right."""

import copy
import json
import os
import pathlib
import time

import pytest
import torch

from tqcompile import coding, formats
from tqcompile.__main__ import main
from tqcompile.sweep import document, examine, pool, quantised, verdict
from tqcompile.sweep.build import Architecture, architectures, make
from tqcompile.sweep.examine import DENSE, INDUCTOR, LOSSLESS, Settings, largest_error
from tqcompile.sweep.records import Records
from tqcompile.sweep.scenarios import SCENARIOS, Scenario, play
from tqcompile.sweep.shrink import WINDOW, tiny_config

pytest.importorskip("transformers")

SHORT = "chunks"
CODEC = "turboquant:4"


def architecture(name: str, family: str = "causal-lm") -> Architecture:
    return next(a for a in architectures((family,)) if a.name == name)


def record_of(name: str, family: str = "causal-lm", **settings) -> dict:
    """What is recorded of an architecture, in this process."""
    sent = []
    examine.examine(architecture(name, family), Settings((SHORT,), **settings), sent.append)
    return sent[-1]


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """A process of tests is not what other processes are made from for long."""
    monkeypatch.setattr(pool, "warm_up", lambda once: None)


def sweep(tmp_path, *arguments: str) -> int:
    files = ["--json", str(tmp_path / "records.json"), "--page", str(tmp_path / "page.md")]
    return main(["sweep", *arguments, "--scenarios", SHORT, "--skip-dense", *files])


def records(tmp_path) -> dict:
    return json.loads((tmp_path / "records.json").read_text())["architectures"]


@pytest.mark.parametrize(
    ("name", "family", "kinds"),
    [
        ("llama", "causal-lm", None),
        ("gemma2", "causal-lm", {"sliding_attention", "full_attention"}),
        ("qwen3_next", "causal-lm", {"linear_attention", "full_attention"}),
        ("deepseek_v3", "causal-lm", None),
        ("mllama", "causal-lm", None),
        ("t5", "seq2seq-lm", None),
        ("llava", "image-text-to-text", None),
    ],
)
def test_an_architecture_is_made_tiny_with_a_layer_of_each_kind(name, family, kinds):
    model = make(architecture(name, family))
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e6
    text = model.config.get_text_config(decoder=True)
    assert text.num_hidden_layers >= 2
    if kinds is not None:
        assert set(text.layer_types) == kinds
    if kinds and "sliding_attention" in kinds:
        assert text.sliding_window == WINDOW < sum(SCENARIOS[0].calls)


def test_heads_that_share_keys_still_do():
    from transformers import LlamaConfig, MistralConfig

    shared, own = tiny_config(MistralConfig), tiny_config(LlamaConfig)
    assert own.num_key_value_heads == own.num_attention_heads
    assert 1 < shared.num_key_value_heads < shared.num_attention_heads


@pytest.mark.parametrize(("name", "family"), [("gpt2", "causal-lm"), ("gemma2", "causal-lm"), ("bart", "seq2seq-lm")])
def test_a_codec_says_what_its_dense_twin_says(name, family):
    record = record_of(name, family, modes=(LOSSLESS, CODEC))
    assert verdict.all_compressed(record) and not verdict.problems(record), record
    assert verdict.worst(record, LOSSLESS) < 1e-5


def test_the_twin_is_told_apart_from_the_untouched_model(monkeypatch):
    """Or a codec that did nothing would pass."""
    monkeypatch.setattr(examine, "_twin", lambda scenario, model, codec, found: play(scenario, model, model))
    record = record_of("gpt2", modes=(CODEC,))
    assert verdict.worst(record, CODEC) > 2 * examine.CODEC_TOLERANCE
    assert [problem.mode for problem in verdict.problems(record)] == [CODEC]


def test_a_cache_that_the_twin_cannot_hold_is_not_compared(monkeypatch):
    assert quantised.covers("layers.0.keys") and quantised.covers("self_attention_cache.layers.11.values")
    assert not quantised.covers("linear_cache.1") and not quantised.covers("layers.1.compressed_kv.indexer")
    monkeypatch.setattr(examine, "covers", lambda path: not path.endswith("keys"))
    record = record_of("gpt2", modes=(CODEC,))
    assert verdict.worst(record, CODEC) is None
    assert any("not compared under a codec" in what and "keys" in what for what, _ in verdict.reasons(record))


def test_a_wrong_number_is_recorded_and_told(tmp_path, monkeypatch, capsys):
    encode = coding.encode
    monkeypatch.setattr(coding, "encode", lambda codec, y: encode(codec, 1.01 * y))
    assert sweep(tmp_path, "--only", "^gpt2$") == 1
    record = records(tmp_path)["causal-lm/gpt2"]
    assert [(problem.scenario, problem.mode) for problem in verdict.problems(record)] == [(SHORT, LOSSLESS)]
    assert "error" in capsys.readouterr().out
    assert "## Wrong or failing" in (tmp_path / "page.md").read_text()


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    assert sweep(tmp_path, "--only", "^gpt2$") == 0
    first = records(tmp_path)
    assert not verdict.problems(first["causal-lm/gpt2"])

    def refuse(*args):
        raise AssertionError("examined again")

    with monkeypatch.context() as patched:
        patched.setattr("tqcompile.sweep.command.examine", refuse)
        assert sweep(tmp_path, "--only", "^gpt2$") == 0
    assert records(tmp_path) == first
    assert "1 architectures, 1 of them" in capsys.readouterr().out

    monkeypatch.setattr("tqcompile.sweep.records.versions", lambda: {"torch": "another"})
    assert sweep(tmp_path, "--only", "^gpt2$") == 0
    assert records(tmp_path)["causal-lm/gpt2"]["versions"] == {"torch": "another"}


def test_a_record_is_added_to():
    old = record_of("gpt2", modes=(LOSSLESS,))
    old["scenarios"][SHORT]["modes"][LOSSLESS]["error"] = 0.25
    wanted, sent = Settings((SHORT,), (LOSSLESS, CODEC)), []
    assert wanted.missing(old) == [(SHORT, CODEC)]
    examine.examine(architecture("gpt2"), wanted, sent.append, old)
    modes = sent[-1]["scenarios"][SHORT]["modes"]
    assert modes[LOSSLESS]["error"] == 0.25 and modes[CODEC]["error"] < examine.CODEC_TOLERANCE
    assert wanted.missing(sent[-1]) == []


def test_a_model_that_cannot_be_made_stands_in_the_table(monkeypatch, tmp_path):
    def broken(architecture, variant=None):
        raise ValueError("heads do not divide the width")

    monkeypatch.setattr("tqcompile.sweep.build.make", broken)
    assert sweep(tmp_path, "--only", "^(gpt2|opt)$", "--families", "causal-lm") == 0
    page = (tmp_path / "page.md").read_text()
    assert page.count("| not made |") == 2 and "ValueError: heads do not divide the width" in page


def sleep(task, send):
    send({"name": task, "stopped": "asleep"})
    time.sleep(60 if task == "slow" else 0)
    send({"name": task})


def grow(task, send):
    held = []
    while True:
        held.append(bytearray(os.urandom(1) * 2**25))
        time.sleep(0.02)


def crash(task, send):
    send({"name": task})
    if task == "bad":
        os.kill(os.getpid(), 9)


def test_a_limit_of_time_ends_one_process_and_no_other():
    started = time.monotonic()
    found = dict(pool.run(["slow", "quick"], sleep, pool.Limits(seconds=1.0)))
    assert time.monotonic() - started < 20
    assert "more than 1 seconds" in found["slow"]["died"] and found["slow"]["stopped"] == "asleep"
    assert "died" not in found["quick"]


def test_a_limit_of_memory_ends_a_process():
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    (_, record), *_ = pool.run(["large"], grow, pool.Limits(20.0, resident + 2**28))
    assert "GiB" in record["died"]


def test_a_limit_ends_what_a_process_started(tmp_path):
    def fork_and_sleep(task, send):
        pool.apart(lambda: (tmp_path / "pid").write_text(str(os.getpid())) and time.sleep(60))

    (_, record), *_ = pool.run(["slow"], fork_and_sleep, pool.Limits(seconds=1.0))
    assert "more than 1 seconds" in record["died"]
    started = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = pathlib.Path(f"/proc/{started}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("what it started lives on")


def test_one_run_learns_nothing_from_another():
    learned = []
    assert pool.apart(lambda: learned.append(1) or {"learned": len(learned)}) == {"learned": 1} and not learned
    assert pool.apart(lambda: os._exit(3))["exception"] == "its process ended with status 3"


def test_a_process_that_dies_is_recorded():
    found = dict(pool.run(["bad", "good"], crash, pool.Limits(20.0), jobs=2))
    assert "status -9" in found["bad"]["died"] and "died" not in found["good"]


def held(compressed: int, count: int, **kinds) -> dict:
    rows = {"self": {"compressed": compressed, "count": count, "bytes": 1, "dense": ["keys"] * (count > compressed)}}
    return {**rows, **{kind: {"compressed": n, "count": n, "bytes": 1, "dense": []} for kind, n in kinds.items()}}


def written(name: str, result: dict, family: str = "causal-lm") -> dict:
    """A record of one scenario in one mode."""
    full = {"step": 0, "reads": {"attend": 2}, "refusals": [], "fallbacks": [], "events": [], "breaks": [], **result}
    scenario = {"dense_held": held(0, 4), "modes": {LOSSLESS: full}}
    versions = {"torch": "2"}
    return {"family": family, "name": name, "scenarios": {SHORT: scenario}, "versions": versions, "inner": "eager"}


GOOD = written("good", {"error": 0.0, "held": held(4, 4)})
HALF = written(
    "half", {"error": 1e-6, "held": held(2, 4), "refusals": [["it is a view", "m.py, line 3", "copy", "k", 2]]}
)
DECODED = written("decoded", {"error": 0.0, "held": held(4, 4), "fallbacks": [["mul", "m.py, line 9", 2]]})
WRONG = written("wrong", {"error": float("nan"), "held": held(4, 4)})
SILENT = written("silent", {"error": 0.0, "held": held(2, 4), "reads": {}})
STATE = written("state", {"error": 0.0, "held": held(4, 4, state=1)})
FELL = written("fell", {"exception": "TypeError: no", "where": "passes/x.py:1", "reads": {}})


def test_records_are_judged():
    assert verdict.all_compressed(GOOD) and verdict.all_fused(GOOD) and not verdict.problems(GOOD)
    assert not verdict.all_compressed(HALF) and not verdict.problems(HALF)
    assert verdict.all_compressed(DECODED) and not verdict.all_fused(DECODED) and not verdict.all_on_codes(DECODED)
    products = written("products", {"error": 0.0, "held": held(4, 4), "reads": {"logits": 1, "mix": 1}})
    assert verdict.all_on_codes(products) and not verdict.all_fused(products) and verdict.all_on_codes(GOOD)
    assert verdict.caches(FELL) == (0, 4)
    for record in (WRONG, SILENT, STATE, FELL):
        assert len(verdict.problems(record)) == 1, record
    FELL["scenarios"][SHORT]["modes"]["dense"] = {"exception": "TypeError: no", "where": ""}
    assert not verdict.problems(FELL) and verdict.dense_fails(FELL) == [SHORT]


def test_plain_inductor_is_recorded_beside_dense_compilation(monkeypatch):
    compilers, compile_ = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, backend: compilers.append(backend) or compile_(model, backend="eager")
    )
    monkeypatch.setattr(examine, "apart", lambda run: run())
    record = record_of("gpt2", modes=(DENSE, INDUCTOR))
    plain = record["scenarios"][SHORT]["modes"]
    assert compilers == ["eager", "inductor"] and plain[INDUCTOR]["error"] == plain[DENSE]["error"]
    assert plain[INDUCTOR]["torch"] == torch.__version__ and not verdict.codecs(record)
    record = copy.deepcopy(GOOD)
    record["scenarios"][SHORT]["modes"][INDUCTOR] = {"exception": "TypeError: no", "where": "", "torch": "2.0"}
    assert not verdict.problems(record) and not verdict.dense_fails(record)
    page = document.page([record])
    assert f"fails: {SHORT} by Inductor" in page and f"Inductor of torch 2.0, {SHORT}" in page


def test_a_scenario_that_dense_compilation_falls_in_counts_for_nothing():
    fallen = {"exception": "TypeError: no", "where": ""}
    record = copy.deepcopy(GOOD)
    ours = {**fallen, "step": 0, "reads": {"logits": 1}, "fallbacks": [["mul", "m.py, line 9", 2]]}
    record["scenarios"]["static"] = {"dense_held": held(0, 4), "modes": {"dense": fallen, LOSSLESS: ours}}
    assert verdict.caches(record) == (4, 4) and verdict.all_compressed(record) and verdict.all_fused(record)
    record["scenarios"]["static"]["modes"]["dense"] = {"error": 0.0, "step": 0}
    assert verdict.caches(record) == (4, 8) and not verdict.all_compressed(record) and not verdict.all_fused(record)
    record = copy.deepcopy(GOOD)
    record["scenarios"][SHORT]["modes"] = {"dense": fallen, LOSSLESS: fallen}
    assert not verdict.has_cache(record) and "none that compiles" in document.page([record])


@pytest.mark.parametrize(("error", "step", "ours"), [(0.4, 0, 0), (0.2, 0, 1), (0.4, 1, 1), (0.0, 0, 1)])
def test_what_dense_compilation_gets_as_wrong_is_not_ours(error, step, ours):
    record = written("both", {"error": 0.4, "held": held(4, 4)})
    record["scenarios"][SHORT]["modes"]["dense"] = {"error": error, "step": step}
    assert len(verdict.problems(record)) == ours
    record["scenarios"][SHORT]["modes"][CODEC] = {"error": 0.5, "step": 3}
    assert len(verdict.problems(record)) == 2 * ours
    record["scenarios"][SHORT]["modes"][LOSSLESS]["error"] = 0.0
    assert len(verdict.problems(record)) == 1


def test_the_page_is_made_from_records(tmp_path):
    document.write(
        tmp_path / "page.md", [GOOD, HALF, DECODED, written("other", {"error": 0.0, "held": held(4, 4)}, "seq2seq-lm")]
    )
    page = (tmp_path / "page.md").read_text()
    assert "not been examined" not in page and "1 architectures have not been examined yet" in document.page(
        [GOOD], [Architecture("causal-lm", "later", "Later")]
    )
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert (
        "4 / 4" in rows["good"] and "2 / 4" in rows["half"] and "[1]" in rows["half"] and "decoded 2" in rows["decoded"]
    )
    assert "1. it is a view: half (`m.py, line 3`)" in page and "2. decoded in front of mul" in page
    assert [cell.strip() for cell in rows["all"].split("|")[2:9]] == [
        "4",
        "4",
        "4",
        "3 (75%)",
        "2 (50%)",
        "2 (50%)",
        "0",
    ]


@pytest.mark.parametrize(
    ("ours", "error"),
    [([1.0, 4.0], 0.0), ([1.0, 4.4], 0.1), ([float("nan"), 4.0], float("inf")), ([1.0], float("inf"))],
)
def test_an_error_is_relative_to_the_largest_logit(ours, error):
    found, _ = largest_error([torch.tensor(ours)], [torch.tensor([1.0, 4.0])])
    assert found == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "("], "no regular expression"),
        (["--only", "no such architecture"], "found in no architecture's name"),
        (["--codec", "q9"], "invalid choice"),
        (["--codec", "qjl:1"], "invalid choice: 'qjl:1'"),
        (["--compile-time", "lama"], "did you mean 'llama'"),
    ],
)
def test_a_mistake_is_told(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", *arguments])
    assert said in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="no file of this command"):
        Records(path)


def test_every_scenario_has_its_own_name_and_room():
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    assert all(isinstance(scenario, Scenario) and scenario.calls for scenario in SCENARIOS)
    assert CODEC in formats.REGISTRY
