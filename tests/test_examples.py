"""Each example runs as its own process, as a reader would start it, and prints what it promises."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: object, expect: int = 0, cwd: pathlib.Path = ROOT) -> str:
    """What an example prints; for one that is to fail, what it complains about."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stderr if expect else done.stdout


def number(pattern: str, text: str) -> float:
    """The one number that a pattern finds, thousands separated by commas."""
    return float(re.search(pattern, text).group(1).replace(",", ""))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """A tiny random model with a tokenizer of its own, saved as `--model` takes it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    words = {word: index for index, word in enumerate(["<unk>", "<end>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant:"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", chat_template=template
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


TINY = ("--inner", "eager", "--keys", "turboquant:5", "--values", "turboquant:4")


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
