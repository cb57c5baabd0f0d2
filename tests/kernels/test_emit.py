import ast
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import sympy
import torch
import triton
from representatives import REPRESENTATIVES

from tqcompile import formats
from tqcompile.codec import Codec, Lookup, Plane, Term
from tqcompile.kernels import append, emit, portable
from tqcompile.kernels.address import expression
from tqcompile.kernels.writers import writer, writes
from tqcompile.layout import COORDINATE, layout_of

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DIMS = (128, 80)


def helpers_text(codec: Codec) -> str:
    texts = []
    for head_dim in DIMS:
        texts += [
            f"# head_dim {head_dim}",
            *emit.reading_helpers("key", codec, head_dim),
            *([writer(codec, head_dim)] if writes(codec, head_dim) else []),
        ]
    return "\n\n\n".join(texts) + "\n"


def compare(name: str, text: str) -> None:
    """`text` is what the golden file holds; with UPDATE_GOLDEN=1 it is written there instead."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    # The last digits of an edge depend on how a machine adds up.
    ours, golden = (re.sub(r"-?\d+\.\d{9,}(e-?\d+)?", _short, each) for each in (text, path.read_text()))
    assert ours == golden, f"{name} changed; see the difference, then run with UPDATE_GOLDEN=1"


def _short(number: re.Match) -> str:
    return f"{float(number[0]):.9g}"


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_the_helpers_of_every_codec_are_the_golden_ones(name):
    compare(f"kernels_{name.replace(':', '_')}.txt", helpers_text(formats.codec(name)))


def test_the_helpers_of_every_reader_are_the_golden_ones():
    readers = [emit.Reader(mask, causal) for mask in ("none", "bool", "additive") for causal in (False, True)]
    readers += [emit.Reader("additive", False, "tanh(score / 50.0) * 50.0")]
    compare(
        "kernels_readers.txt", "\n\n\n".join(f"# {reader}\n{emit.score_helper(reader)}" for reader in readers) + "\n"
    )


@pytest.mark.parametrize("name", formats.REGISTRY)
@pytest.mark.parametrize("head_dim", [2, 33, 48, 80, 128])
def test_printed_addresses_are_those_of_the_layout(name, head_dim):
    codec = formats.codec(name)
    layout = layout_of(codec, max(head_dim, codec.minimum_head_dim), torch.float32, "cuda")
    for plane in layout.planes:
        for stated in (part for section in plane.sections for part in (section.byte, section.bit)):
            printed = eval(f"lambda d: {expression(stated, plane.count)}")
            truth = sympy.lambdify(COORDINATE, stated, {"floor": math.floor})
            assert [printed(d) for d in range(plane.count)] == [truth(d) for d in range(plane.count)]


def test_expressions_are_printed_as_triton_reads_them():
    assert expression(3 + sympy.Mod(COORDINATE, 16), 64) == "d % 16 + 3"
    assert expression(4 * sympy.floor(COORDINATE / 16), 64) == "4*(d // 16)"
    assert expression(4 * sympy.floor(COORDINATE / 64) + sympy.Mod(COORDINATE, 64), 64) == "d"


def test_a_module_stands_alone_and_is_named_by_its_content(tmp_path):
    codec = formats.codec("turboquant:3")
    text = portable.source(codec, codec, (64, 64), emit.Reader("bool"))
    tree = ast.parse(text)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"triton", "triton.language"}
    path = emit.write(text, tmp_path)
    assert path == emit.write(text, tmp_path) and path.read_text() == text
    assert path != emit.write(append.source(codec, 64), tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".py", ".py"]


def test_another_process_prints_the_same_text():
    program = (
        "from tqcompile.formats import codec; from tqcompile.kernels import portable;"
        "from tqcompile.kernels.emit import Reader;"
        "print(portable.source(codec('turboquant:5'), codec('q8_0'), (80, 64), Reader('bool', True)), end='')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(GOLDEN.parents[1])}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    here = portable.source(formats.codec("turboquant:5"), formats.codec("q8_0"), (80, 64), emit.Reader("bool", True))
    assert other.stdout == here


def test_interpreting_one_module_leaves_triton_compiling_elsewhere(tmp_path):
    codec = formats.codec("turboquant:4")
    interpreted = append.module(codec, 64, str(tmp_path), True)
    compiled = append.module(codec, 64, str(tmp_path), False)
    assert not triton.knobs.runtime.interpret
    assert isinstance(compiled.append_tokens, triton.JITFunction)
    assert not isinstance(interpreted.append_tokens, triton.JITFunction)


def test_a_reader_refuses_a_mask_it_does_not_know():
    with pytest.raises(ValueError, match="allowed are"):
        emit.Reader("float")


def test_a_codec_whose_bytes_cross_blocks_is_refused_with_a_sentence():
    codes, scale = Lookup(Plane("codes", 4), "signed"), Lookup(Plane("scale", 16, per=32), "half")
    codec = Codec("nibbles", (Term("standard", (scale, codes), "absmax"),), False, "a test")
    assert "tl.store" in append.source(codec, 128)
    with pytest.raises(ValueError, match="cross blocks"):
        append.source(codec, 48)
