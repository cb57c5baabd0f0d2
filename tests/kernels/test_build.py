import itertools
import json
import re

import pytest
import torch
import triton

from tqcompile import formats
from tqcompile.kernels import assembled, build, combine, stretch, tune
from tqcompile.kernels.emit import Reader

FEW = [
    (("turboquant:4", "turboquant:3"), 128, Reader("bool"), torch.bfloat16, 4, 90),
    (("turboquant:5", "turboquant:5"), 128, Reader("additive"), torch.float16, 4, 80),
    (("q8_0", "q8_0"), 128, Reader("none", True), torch.bfloat16, 512, 90),
    (("q8_0", "turboquant:2"), 64, Reader(), torch.float32, 4, 80),
    (("polarquant", "polarquant"), 128, Reader("bool"), torch.bfloat16, 4, 90),
    (("q4_0", "turboquant:2.5"), 128, Reader(), torch.bfloat16, 4, 90),
    (("qjl:2", "turboquant_prod:3"), 64, Reader("additive"), torch.float16, 4, 80),
    (("turboquant:3:trellis", "turboquant:2:trellis"), 128, Reader("bool"), torch.bfloat16, 4, 90),
]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_attend_compiles_without_a_device_and_spills_nothing(case):
    names, *rest = case
    usage = build.attend_usage(tuple(map(formats.codec, names)), *rest)
    assert usage.spills == 0 and 0 < usage.registers <= 255


CHUNKS = [
    (("turboquant:4", "turboquant:4"), 128, Reader(), 512),
    (("turboquant:5", "turboquant:5"), 128, Reader("bool"), 64),
    (("turboquant:5", "turboquant:3"), 96, Reader("additive"), 64),
    (("turboquant:3", "turboquant:3"), 96, Reader("bool"), 64),
    (("turboquant:5", "turboquant:5"), 64, Reader("additive", score_mod="tanh(score) * 50.0"), 512),
    (("turboquant:3", "turboquant:3"), 256, Reader("bool"), 64),
]


@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_a_chunk_compiles_without_a_device_and_spills_nothing(case):
    names, *rest = case
    usage = build.chunk_usage(tuple(map(formats.codec, names)), *rest)
    assert usage.spills == 0 and 0 < usage.registers <= 255


@pytest.mark.parametrize("rows", [64, 512])
def test_who_writes_for_matrix_units_fences_before_the_barrier(rows, monkeypatch):
    """A fence behind it would be that of who reads alone, of which there may be two groups of warps."""
    found, compile_kernel = [], triton.compile
    monkeypatch.setattr(
        triton, "compile", lambda *a, **options: found.append(compile_kernel(*a, **options)) or found[-1]
    )
    build.chunk_usage((formats.codec("turboquant:4"),) * 2, 128, Reader("bool"), rows)
    is_fenced, products = False, 0
    for line in found[-1].asm["ptx"].splitlines():
        if "fence.proxy.async" in line:
            is_fenced = True
        elif "bar.sync" in line or line.startswith("$L__BB"):
            is_fenced = False
        elif "wgmma.mma_async" in line:
            assert not is_fenced
            products += 1
    assert products


INTEGER = [
    (("turboquant:4", "turboquant:3"), 128, Reader("bool"), 4, 90),
    (("turboquant:3", "turboquant:3"), 64, Reader(), 4, 80),
    (("turboquant:2", "turboquant:2"), 96, Reader("additive"), 8, 90),
    (("turboquant:4", "turboquant:4"), 256, Reader("none", True), 4, 90),
    (("turboquant:4", "turboquant:4"), 192, Reader("additive"), 4, 90),
    (("turboquant:5", "turboquant:5"), 96, Reader("bool"), 4, 90),
    (("turboquant_prod:2", "turboquant_prod:2"), 96, Reader("bool"), 4, 80),
    (("q8_0", "q8_0"), 128, Reader("bool"), 8, 90),
    (("q8_0", "turboquant:3"), 96, Reader(), 4, 80),
    (("q4_0", "q4_0"), 128, Reader("bool"), 8, 90),
    (("turboquant:5", "q8_0"), 256, Reader("additive"), 4, 90),
    (("turboquant:3.5", "turboquant:3.5"), 128, Reader("bool"), 4, 90),
    (("turboquant_prod:5", "turboquant_prod:5"), 128, Reader(), 4, 80),
    (("qjl:2", "kvtc:4"), 128, Reader(), 8, 90),
]


@pytest.fixture
def texts(monkeypatch):
    """The text of each kernel that is compiled, before it becomes one for a thread."""
    found, compile = [], triton.compile

    def compiled(*arguments, **options):
        binary = compile(*arguments, **options)
        found.append(binary.asm["ttgir"])
        return binary

    monkeypatch.setattr(triton, "compile", compiled)
    return found


def bytes_of_a_word_are_neighbours(text):
    """An instruction that makes four bytes writes four registers, which must be those of its last two dimensions."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.linear<\{register = (\[\[.*?\]\])", text, re.M))
    packs = re.findall(r"packed_element = 4 .*-> tensor<[^,]*, (#\w+)>", text)
    for name in packs:
        first, second = json.loads(layouts[name])[:2]
        assert first == [0] * (len(first) - 1) + [1] and second == [*first[1:], 0]
    return bool(packs)


@pytest.mark.parametrize("case", INTEGER, ids=str)
def test_attend_on_int8_units_needs_no_shared_memory_and_spills_nothing(case, texts):
    names, *rest = case
    usage = build.integer_usage(tuple(map(formats.codec, names)), *rest)
    assert usage.shared == 0 and usage.spills == 0
    assert bytes_of_a_word_are_neighbours(*texts)


RING = [(tuple(f"turboquant:{count}" for count in bits), 128, 4) for bits in ((4, 3), (5, 2))]
RING += [(("turboquant:3",) * 2, 96, 4), (("turboquant:4",) * 2, 64, 8), (("turboquant:1",) * 2, 128, 8)]
RING += [((f"turboquant_prod:{bits}",) * 2, 128, 4) for bits in (2, 3, 5)]
RING += [(("turboquant:4",) * 2, dim, 8) for dim in (96, 192)] + [(("turboquant:2",) * 2, 96, 4)]
RING += [(("turboquant_prod:4",) * 2, 96, 4), (("turboquant:5", "turboquant_prod:3"), 128, 8)]
RING += [((name,) * 2, 128, 4) for name in ("turboquant:2.5", "turboquant:3.5") if stretch.GATHERS.value]


@pytest.mark.parametrize(("names", "dim", "rows"), RING, ids=str)
def test_attend_through_shared_memory_spills_nothing(names, dim, rows, texts):
    pair = tuple(map(formats.codec, names))
    usage = build.integer_usage(pair, dim, Reader("bool"), rows, 90, True)
    assert usage.shared > 0 and usage.spills == 0
    assert bytes_of_a_word_are_neighbours(*texts)


LOGITS = [
    ("turboquant:4", 128, torch.float32, 4, 90),
    ("turboquant:3", 128, torch.bfloat16, 4, 80),
    ("turboquant:5", 96, torch.float16, 8, 90),
    ("turboquant:2", 64, torch.float32, 8, 80),
    ("q8_0", 256, torch.bfloat16, 4, 80),
    ("q4_0", 128, torch.float32, 4, 90),
    ("turboquant_prod:4", 128, torch.bfloat16, 4, 90),
    ("kvtc:4", 128, torch.float32, 8, 90),
    ("qjl:2", 128, torch.bfloat16, 4, 80),
]


@pytest.mark.parametrize("case", LOGITS, ids=str)
def test_logits_on_int8_units_need_no_shared_memory_and_spill_nothing(case, texts):
    usage = build.logits_usage(formats.codec(case[0]), *case[1:])
    assert usage.shared == 0 and usage.spills == 0
    assert bytes_of_a_word_are_neighbours(*texts) or case[0] in ("q8_0", "q4_0")


def test_scores_take_few_instructions_a_number_of_a_key():
    usage = build.logits_usage(formats.codec("turboquant:4"), 128, torch.float32, 4, 90)
    assert 0 < usage.instructions < 2


@pytest.mark.parametrize("name", ["q8_0", "turboquant:5", "q4_0:hadamard", "turboquant:3:norm"])
def test_append_compiles_without_a_device_and_spills_nothing(name):
    assert build.append_usage(formats.codec(name), 128, torch.bfloat16, 4096, 90).spills == 0


@pytest.mark.parametrize("reader", [Reader("none"), Reader("bool"), Reader("additive", True)], ids=str)
def test_what_reads_tokens_that_are_kept_as_they_are_spills_nothing(reader):
    assert not [usage for usage in build.exact_usages(128, reader, torch.bfloat16, 90) if usage.spills]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_of_a_path_spills_nothing(bits):
    assert build.path_usage(bits, 128, 90).spills == 0


@pytest.mark.slow
def test_no_kernel_of_any_codec_spills():
    assert not [usage for usage in build.every_usage() if usage.spills]


def combination(constants, pointers, warps):
    """The combination, compiled with these blocks and switches."""
    kernel = combine.combine_module(None, False).attend_combine
    constants = {"EARLY": True, **constants}
    types = {name: "*fp32" for name in kernel.arg_names if name not in ("rows", "splits", *constants)}
    types["order"] = "*i32"
    return assembled.compiled("combine", kernel, pointers, constants, types, warps, None, 90)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("sinks, others, turned", itertools.product((False, True), (False, True), (0, 16)))
def test_the_combination_compiles_beside_sinks_and_tokens_that_are_summed_elsewhere(sinks, others, turned, ordered):
    """What Triton's interpreter lets pass: a name that has another shape inside a loop than before it."""
    constants = {"VALUE_DIM": 48 if ordered else 64, "WIDTH": 64, "BLOCK_S": 16, "BLOCK_V": 64, "BLOCK_J": turned}
    constants |= {"ORDERED": ordered, "SINKS": sinks, "OTHERS": others}
    assert combination(constants, {}, 4).spills == 0


@pytest.mark.parametrize("splits, rows", [(1, 256), (16, 256), (128, 32)])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_combination_spills_nothing_as_it_is_planned(dtype, dim, splits, rows):
    *blocks, warps = tune.combine_blocks(splits, dim, rows, dtype.itemsize)
    constants = {"VALUE_DIM": dim, "WIDTH": dim, **dict(zip(("BLOCK_S", "BLOCK_V", "BLOCK_J"), blocks))}
    constants |= {"ORDERED": True, "SINKS": False, "OTHERS": False}
    assert combination(constants, {"basis": dtype, "out": dtype}, warps).spills == 0
