"""Each example runs as its own process, as a reader would start it, and prints what it promises."""

import functools
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from checkpoints import save_characters
from transformers import LlamaConfig

from tqcompile import formats

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TINY = ("--inner", "eager", "--keys", "turboquant:5", "--values", "turboquant:4")


def run(name: str, *arguments: object, folder: pathlib.Path = EXAMPLES) -> str:
    """What an example prints."""
    return execute(folder / name, *arguments)


def execute(*arguments: object) -> str:
    """What Python prints that is started so."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def complaint(capsys, monkeypatch, name: str, *arguments: object) -> str:
    """What an example ends with that was started wrongly; in this process, for no compiler is needed to complain."""
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main(list(map(str, arguments)))
    return f"{end.value} {capsys.readouterr().err}"


def number(pattern: str, text: str) -> float:
    """The one number that a pattern finds, thousands separated by commas."""
    return float(re.search(pattern, text).group(1).replace(",", ""))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """A tiny random model with a tokenizer of its own, saved as `--model` takes it."""
    return save_characters(tmp_path_factory.mktemp("checkpoint"))


def test_demo(checkpoint):
    shown = run("demo.py", "--model", checkpoint, "--context", 300, "--tokens", 12, *TINY)
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith(("dense ", "compressed "))}
    assert re.search(r"live bytes +bits/element +smaller +tokens/s +top-1 agreement +mean KL", shown)
    # 2 layers of 2 heads, keys and values of 32 numbers in float32: every number of the dense row follows.
    tokens = number(r"(\d+) tokens read", shown) + 12
    assert number(r"dense +([\d,]+)", rows["dense"]) == tokens * 2 * 2 * 2 * 32 * 4
    assert number(r"dense +[\d,]+ +([\d.]+)", rows["dense"]) == 32
    assert 4.5 < number(r"compressed +[\d,]+ +([\d.]+)", rows["compressed"]) < 8
    assert number(r"([\d.]+)% of 12", rows["compressed"]) > 50
    assert 0 < number(r"% of 12 +([\d.]+)", rows["compressed"]) < 0.5
    for part in ("--- dense cache ---", "--- compressed cache ---", "--- report ---"):
        assert part in shown
    assert "4 cache sites compressed" in shown or "8 cache sites compressed" in shown
    assert "left dense" not in shown


def test_demo_without_loss_says_the_same_twice(checkpoint):
    same = ("--inner", "eager", "--keys", "identity", "--values", "identity")
    shown = run("demo.py", "--model", checkpoint, "--context", 60, "--tokens", 8, *same)
    texts = re.search(r"--- dense cache ---\n(.*)\n--- compressed cache ---\n(.*)\n--- report ---", shown, re.S)
    assert texts.group(1).strip() == texts.group(2).strip()
    assert "100.0% of 8" in shown and "0.0000" in shown


@pytest.mark.parametrize("name", ["generate_dynamic.py", "generate_static.py"])
def test_generate(checkpoint, name):
    shown = run(name, "--model", checkpoint, "--prompt", "once upon a time", "--tokens", 12, *TINY)
    assert shown.startswith("o n c e   u p o n   a   t i m e ")
    held = number(r"the cache that generate returned takes ([\d,]+) bytes", shown)
    assert "live caches: 4," in shown and number(r"live caches: 4, ([\d,]+) bytes measured", shown) == held
    assert re.search(r"keys +turboquant:5 +2$", shown, re.M) and re.search(r"values +turboquant:4 +2$", shown, re.M)
    assert "left dense" not in shown and "ran dense" not in shown


def test_hand_written():
    shown = run("hand_written.py", "--tokens", 20, *TINY)
    assert shown.startswith("20 tokens: [")
    assert "the key cache of layer 0 is now a CompressedKV(turboquant:5, shape=(1, 4, 68, 64)" in shown
    assert "live caches: 4," in shown
    assert "left dense" not in shown and "ran dense" not in shown


def test_tensor_parallel():
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, EXAMPLES / "tensor_parallel.py")
    shown = execute(*command, "--tokens", 8, *TINY)
    rows = [line.split() for line in shown.splitlines() if re.match(r" +\d+  (cpu|cuda)", line)]
    assert [row[0] for row in rows] == ["0", "1"]
    for _, _, caches, heads, ours, dense, agreement, *_ in rows:
        # 2 of 4 KV heads of 32 numbers, keys and values of 2 layers; 64 tokens read and 8 decoded, in float32.
        assert (caches, heads, dense) == ("4", "2", f"{72 * 2 * 32 * 2 * 2 * 4:,}")
        assert number(r"(.*)", ours) < number(r"(.*)", dense) / 4
        assert float(agreement.rstrip("%")) > 50
    assert "live caches: 4," in shown and "left dense" not in shown


def test_an_example_for_torchrun_says_so_without_it(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun --nproc-per-node 2" in complaint(capsys, monkeypatch, "tensor_parallel")


def test_bench_cpu(checkpoint):
    shown = run("bench_cpu.py", "--model", checkpoint, "--context", 200, "--steps", 3, *TINY)
    rows = re.findall(
        r"^(dense, growing cache|dense, static cache|compressed, keys \S+ values \S+) +(.*)$", shown, re.M
    )
    assert [name for name, _ in rows] == [
        "dense, growing cache",
        "dense, static cache",
        "compressed, keys turboquant:5, values turboquant:4",
    ]
    columns = [[float(cell.replace(",", "")) for cell in cells.split()] for _, cells in rows]
    assert min(columns[0][2], columns[1][2]) == 1
    assert number(r"compressed over the faster dense step: ([\d.]+)", shown) == columns[2][2]
    assert columns[2][4] < columns[0][4] / 3
    assert "stayed dense" not in shown


def test_quality(checkpoint, tmp_path):
    pairs = ("identity/identity", "turboquant:4/turboquant:4", "turboquant:2/turboquant:2")
    target = tmp_path / "quality.json"
    size = ("--windows", 2, "--length", 64)
    shown = run("quality.py", "--model", checkpoint, *size, "--pairs", *pairs, "--write", target)
    rows = json.loads(target.read_text())["rows"]
    assert [row["pair"] for row in rows] == list(pairs)
    exact, four, two = rows
    assert exact["bits"] == 32 and exact["kl"] < 1e-9 and exact["top1"] == 1
    assert 4 < four["bits"] < 5 and exact["kl"] < four["kl"] < two["kl"]
    for row in rows:
        assert f"| {row['kl']:.4f} |" in re.sub(" +", " ", shown)


@pytest.fixture
def copied(tmp_path) -> pathlib.Path:
    """The examples in a tree of their own, where they may write pages."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "quality.json", tmp_path / "docs")
    return pathlib.Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))


def test_the_page_of_codecs_is_what_the_codecs_say(copied):
    page = (ROOT / "docs" / "codecs.md").read_text()
    assert run("codec_table.py") == page
    assert run("codec_table.py", "--write", folder=copied) == ""
    assert (copied.parent / "docs" / "codecs.md").read_text() == page


def test_figure(copied):
    run("figure.py", folder=copied)
    drawing = (copied.parent / "docs" / "quality.svg").read_text()
    rows = json.loads((ROOT / "docs" / "quality.json").read_text())["rows"]
    shown = [row["pair"] for row in rows if row["bits"] < 16]
    assert len(shown) > 5
    for pair in shown:
        assert pair.replace("turboquant:", "").replace("/", " / ") in drawing


WRONG = {
    "a codec that is none": ("demo", "--keys", "turboqant:4", "turboquant:4"),
    "a model that is nowhere": ("demo", "--model", "./nowhere", "--model ./nowhere cannot be loaded"),
    "a device that is none": ("generate_static", "--device", "abacus", "'abacus' cannot be used"),
    "no tokens": ("hand_written", "--tokens", "0", "'0' is not a whole number of 1 or more"),
    "half a pair": ("quality", "--pairs", "q8_0", "'q8_0' is not KEYS/VALUES"),
}


def test_frontier(checkpoint, tmp_path):
    target, drawing = tmp_path / "frontier.json", tmp_path / "frontier.svg"
    sizes = ("--windows", 2, "--tuning-windows", 1, "--long-windows", 1, "--calibration-windows", 2, "--seeds", 2)
    lengths = ("--length", 160, "--long-length", 256)
    only = ("--only", "2t/2t", "3s8/3s8 centre-before", "by layer", "KIVI 2")
    files = ("--write", target, "--plot", drawing)
    shown = run("frontier.py", "--model", checkpoint, *sizes, *lengths, *only, *files)
    parts = json.loads(target.read_text())["parts"]
    rows = {name: {row["system"]: row for row in part["rows"]} for name, part in parts.items()}
    assert list(rows) == ["main", "long", "bias"]
    assert rows["main"]["3/3"]["bits"] == 3.5 and rows["main"]["q4_0+Hadamard"]["bits"] == 4.5
    assert rows["main"]["3/3"]["kl"] > 2 * rows["main"]["4/4"]["kl"] > 0
    assert rows["bias"]["4/4, biased"]["kl"] > rows["bias"]["4/4"]["kl"]
    # A basis [32, 32] in float16 for 2 layers, 2 heads, keys and values, over 2 x 2 x 2 x 32 numbers a token.
    learned = rows["long"]["2t/2t after-RoPE centre-before sinks1"]
    contexts = range(193, 257)
    table = 8 * 32 * 32 * 2 / 32 * sum(1 / context for context in contexts) / len(contexts)
    assert learned["bits_alone"] - learned["bits"] == pytest.approx(table)
    # Three bars with a model's tables counted and shared, and the last for each way to centre.
    assert len(re.findall(r"\| (?:NOT )?met +\|", shown)) == 2 * 3 + 3
    assert "<svg" in drawing.read_text()


def test_presets(checkpoint, tmp_path, capsys, monkeypatch):
    """Of random weights, only what does not hang on them: bits, bytes, and that a bar is judged by its figures."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example, found = importlib.import_module("presets"), tmp_path / "found.json"
    monkeypatch.setattr(example, "SEEDS", example.SEEDS[:2])
    monkeypatch.setattr(example, "SHORT", dict(list(example.SHORT.items())[:1]))
    presets = {name: formats.PRESETS[name] for name in ("balanced", "tiny")}
    monkeypatch.setattr(formats, "PRESETS", presets)
    size = {"context": 128, "short": 128, "windows": 2, "batch": 2, "chunk": 16, "dtype": "float32", "json": found}
    given = ["--model", checkpoint, "--no-needle", *(part for name, of in size.items() for part in (f"--{name}", of))]
    example.main(list(map(str, [*given, "--part", "table", "short"])))
    shown, parts = capsys.readouterr().out, json.loads(found.read_text())
    table = parts["table"]
    assert list(table) == ["dense", *presets] and presets["tiny"].extras in shown
    # A scalar of 16 bits for each vector of 32 numbers; and of a Llama, for 128.
    assert table["balanced"]["bits"] == 4.5 and table["balanced"]["bytes_a_token"] == 32 * 8 * (128 * 8 / 8 + 4)
    # 68 of 128 tokens in 32 bits, and two vectors.
    assert table["tiny"]["bits"] > 2.5 + 68 / 128 * 32 and table["tiny"]["kl"] > 0
    rows = {name: [row["kl"] for row in rows] for name, rows in parts["short"].items()}
    assert len(rows["q4_0:hadamard"]) == 1 and len(set(rows["turboquant:4+centre+sinks=1"])) == 2
    (line,) = (line for line in shown.splitlines() if line.startswith("| <= 4.3"))
    kl, _, bits, bound, said = (cell.split(" by ")[0].strip() for cell in line.split("|")[2:-1])
    assert float(bound) == pytest.approx(0.6 * rows["q4_0:hadamard"][0], abs=1e-5)
    assert said == ("met" if float(kl) <= float(bound) and float(bits) <= 4.3 else "NOT met")


@pytest.mark.parametrize("name, most, least", [("small", 3.25, 1799), ("tiny", 2.67, 2063)])
def test_presets_are_as_small_as_they_say_from_the_length_that_they_say(name, most, least, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("presets")
    numbers = 2 * example.LAYERS * example.KV_HEADS * example.HEAD_DIM
    longer, shorter = (8 * example.bytes_a_token(formats.PRESETS[name], n) / numbers for n in (least, least - 1))
    assert longer <= most < shorter


def test_option_costs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example, decoder = importlib.import_module("option_costs"), importlib.import_module("tqcompile.bench.decoder")
    monkeypatch.setattr(decoder, "VOCABULARY", 50)
    monkeypatch.setattr(example, "Shape", functools.partial(example.Shape, heads=2, kv_heads=1, head_dim=16))
    example.main(["--device", "cpu", "--inner", "eager", "--batch", "1", "--context", "40", "--layers", "1"])
    rows = re.findall(r"^(\S.*?) +([\d.]+) +([\d.]+) x +([+-]\d+)$", capsys.readouterr().out, re.MULTILINE)
    times = {name: float(ms) for name, ms, *_ in rows}
    assert list(times) == ["dense", *example.EXTRAS]
    for name, ms, ratio, more in rows:
        assert float(ratio) == pytest.approx(times["dense"] / float(ms), abs=0.02)
        assert float(more) == pytest.approx(1e3 * (times[name] - times["plain codes"]), abs=1.1)


def test_growing_cache(capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("growing_cache")
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50}
    monkeypatch.setattr(example, "LlamaConfig", lambda **given: LlamaConfig(**given | sizes | {"intermediate_size": 8}))
    example.main(["--device", "cpu", "--inner", "eager", "--batch", "2", "--context", "40", "--layers", "1"])
    rows = re.findall(r"^(\S+) +((?:[\d.]+, ){2}[\d.]+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, *_ in rows] == ["dense", "turboquant:4"]
    assert all(float(step) > 0 for _, _, step, _ in rows)


def test_latent_costs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example, clock = (importlib.import_module(name) for name in ("latent_costs", "tqcompile.bench.clock"))
    monkeypatch.setattr(clock, "ROTATED_BYTES", 2**16)
    sizes = ["--batch", "2", "--context", "40", "--latent", "32", "--rope", "8", "--heads", "2", "3"]
    example.main([*sizes, "--device", "cpu"])
    rows = re.findall(r"^(\d) +(\S.*?) +([\d.]+) +([\d.]+) x$", capsys.readouterr().out, re.MULTILINE)
    kinds = ["spelled out", "fused", "scores as a mask", "both caches", "made each step"]
    assert [row[:2] for row in rows] == [(heads, kind) for heads in "23" for kind in kinds]
    assert all(min(float(ratio) for _, _, _, ratio in rows[at : at + 2]) <= 1.0 for at in (0, 5))


def test_latent_costs_holds_every_result_to_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("latent_costs")
    monkeypatch.setattr(example.Case, "spelled_out", lambda self, i: self.caches[i][0][:, :, :1].expand(-1, 2, -1, -1))
    with pytest.raises(ArithmeticError, match="spelled out is off by"):
        example.main(
            ["--batch", "1", "--context", "9", "--latent", "16", "--rope", "8", "--heads", "2", "--device", "cpu"]
        )


def test_joined_heads(checkpoint, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("joined_heads")
    given = ["--model", str(checkpoint), "--codecs", "quality", "--windows", "1", "--context", "32", "--device", "cpu"]
    example.main(given)
    said = capsys.readouterr().out
    assert number(r"heads of (\d+) dims", said) == 2 * 128 / 4 and re.search(r"^quality +8\.50 ", said, re.MULTILINE)
    # What it checks before it measures can fail.
    wrong = {**example._PARTS, "v_proj": lambda weight, *_: weight.repeat(2, 1)}
    monkeypatch.setattr(example, "_PARTS", wrong)
    with pytest.raises(SystemExit, match="are off by"):
        example.main(given)


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named(mistake, capsys, monkeypatch):
    *call, words = WRONG[mistake]
    assert words in complaint(capsys, monkeypatch, *call)


def test_more_tokens_than_there_are(checkpoint, capsys, monkeypatch):
    given = ("--model", checkpoint, "--context")
    assert "this model reads 1024" in complaint(capsys, monkeypatch, "demo", *given, 2000)
    assert "tokens of text there are" in complaint(capsys, monkeypatch, "bench_cpu", *given, 10**8)


@pytest.mark.slow
def test_demo_as_make_runs_it():
    shown = run("demo.py", "--tokens", 32)
    assert number(r"dense +[\d,]+ +([\d.]+)", shown) == 32
    assert number(r"\ncompressed +[\d,]+ +[\d.]+ +([\d.]+) x", shown) > 5
    assert "live caches: 60," in shown and "left dense" not in shown
