"""Option `dump`: which files there are, and that each holds what its name says."""

import ast
import re

import pytest
import torch
from test_mutations import SIZE, Layer, calls

import tqcompile
from tqcompile.dump import Dump, kernel_sources, texts_kept
from tqcompile.reads import kernels_of

F = torch.nn.functional
CODECS = {"keys": "turboquant:4", "values": "q8_0"}


def dumped(folder, model, *args, **options):
    """The text of every file, without comments, by what its name says after the graph's."""
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="turboquant", options={**CODECS, "dump": folder, **options})(*args)
    return {path.name.split(".", 1)[1]: re.sub("#.*", "", path.read_text()) for path in folder.iterdir()}


def test_the_graph_is_written_before_and_after(tmp_path):
    folder, model = tmp_path / "new" / "folder", Layer()
    code = dumped(folder, model, *next(calls()), inner="eager")
    assert code.keys() == {"before.py", "after.py"}
    assert "scaled_dot_product_attention(" in code["before.py"] and "tqcompile" not in code["before.py"]
    assert "tqcompile.append" in code["after.py"] and "tqcompile.attend" in code["after.py"]
    assert "scaled_dot_product_attention(" not in code["after.py"]
    (graph,) = tqcompile.report(model).graphs
    assert graph.dump in map(str, folder.glob("*.after.py"))
    ast.parse(code["after.py"])


def test_the_source_that_inductor_generated_calls_the_operators(tmp_path):
    code = dumped(tmp_path, Layer(), *next(calls()))
    assert code.keys() == {"before.py", "after.py", "inductor.py"}
    source = code["inductor.py"]
    ast.parse(source)
    assert "def call(" in source and "scaled_dot_product_attention" not in source
    assert source.count("torch.ops.tqcompile.append_step.default(") == 1
    assert source.count("torch.ops.tqcompile.attend.default(") == 1


def test_a_mode_of_inductor_writes_the_source_too(tmp_path):
    backend = tqcompile.turboquant(**CODECS, dump=tmp_path)
    with torch.no_grad():
        torch.compile(Layer(), backend=backend, mode="reduce-overhead")(*next(calls()))
    assert len(list(tmp_path.glob("*.inductor.py"))) == 1


def trained(dump=None):
    """A query is trained on two caches: a graph that AOTAutograd keeps in its cache."""

    def read(keys, values, q):
        return F.scaled_dot_product_attention(q, keys, values).sum()

    torch._dynamo.reset()
    caches = [tqcompile.CompressedKV.encode(torch.randn(SIZE), tqcompile.formats.codec("identity")) for _ in "kv"]
    q = torch.randn(2, 4, 2, 32, requires_grad=True)
    torch.compile(read, backend="turboquant", options={"dump": dump})(*caches, q).backward()


def test_a_backward_graph_has_a_file_of_its_own_also_where_both_are_in_a_cache(tmp_path):
    trained(), trained(dump=tmp_path)
    files = {path.name.split(".", 1)[1]: path.read_text() for path in tmp_path.iterdir()}
    assert files.keys() == {"before.py", "after.py", "inductor.py", "inductor_backward.py"}
    assert "forward" in files["inductor.py"] and "backward" in files["inductor_backward.py"]


READERS = {
    "no mask": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v), "none_mask"),
    "causal": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal_none_mask"),
    "bool": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask), "bool_mask"),
    "additive": (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask.float()), "additive_mask"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("values", ["q8_0", "turboquant:3", "turboquant:8"])
def test_the_kernels_of_a_graph_are_those_of_its_codecs_and_readers(name, values, tmp_path, monkeypatch):
    read, said = READERS[name]
    graphs = []
    monkeypatch.setattr(Dump, "graphs", lambda self, before, after, sites: graphs.append((after, sites)))

    def step(keys, values, q, at, mask):
        keys[:, :, at] = q
        values[:, :, at] = q
        return read(q, keys, values, mask)

    args = (torch.zeros(SIZE), torch.zeros(SIZE), *next(calls())[::3], torch.ones(2, 8, dtype=torch.bool))
    options = {**CODECS, "values": values, "inner": "eager", "dump": tmp_path}
    with torch.no_grad():
        torch.compile(step, backend="turboquant", options=options)(*args)
    ((after, sites),) = graphs
    sources = kernel_sources(after, sites)
    values = values.replace(":", "_")
    attend = f"attend_turboquant_4_{values}_32_32_{said}"
    appends = {"append_turboquant_4_32", f"append_{values}_32"}
    # A codebook of eight bits alone has no kernel on int8 units; which one runs depends on the device.
    int8 = {f"{attend}_int8"} if values != "turboquant_8" else set()
    chunk = {f"{attend}_chunk"} if values == "turboquant_3" else set()
    both = {f"append_step_turboquant_4_{values}_32_32"}
    decoded = {"decode_turboquant_4_32", f"decode_{values}_32"}
    kernels = {
        **{what: {"append_tokens"} for what in appends},
        **{what: {"append_step_rows", "write_keys", "write_values"} for what in both},
        **{what: {"decode_tokens", "token_numbers"} for what in decoded},
        **{what: {"attend_split", "read_scores", "key_numbers"} for what in [attend]},
        **{what: {"attend_ringed", "key_look_up"} for what in int8},
        **{what: {"attend_chunk", "key_look_up"} for what in chunk},
    }
    assert sources.keys() == kernels.keys()
    for what, text in sources.items():
        functions = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        assert kernels[what] <= functions
    for what in {attend} | int8 | chunk:
        scores = "".join(re.findall(r"def (?:masked|read_scores)\(.*?\n\n", sources[what], re.DOTALL))
        assert scores.count("def read_scores") == 1 and ("<= query" in scores) == (name == "causal")
        added = re.search(r"scores \+=? part", scores) is not None
        assert ("part != 0" in scores) == (name == "bool") and added == (name == "additive")


def test_single_products_have_the_kernels_that_multiply_codes_or_decode_them(tmp_path, monkeypatch):
    graphs = []
    monkeypatch.setattr(Dump, "graphs", lambda self, before, after, sites: graphs.append((after, sites)))

    def step(keys, values, q, at):
        keys[:, :, at] = q
        values[:, :, at] = q
        scores = (q @ keys.transpose(2, 3)).square()
        return scores.softmax(-1) @ values

    args = (torch.zeros(SIZE), torch.zeros(SIZE), *next(calls())[::3])
    with torch.no_grad():
        torch.compile(step, backend="turboquant", options={**CODECS, "inner": "eager", "dump": tmp_path})(*args)
    ((after, sites),) = graphs
    sources = kernel_sources(after, sites)
    assert {"logits_turboquant_4_32_int8", "decode_turboquant_4_32", "decode_q8_0_32"} <= sources.keys()
    assert "def logits_fragments(" in sources["logits_turboquant_4_32_int8"]
    kernels = {what: kernel for what, _, kernel in kernels_of(after)}
    assert kernels["query x keys"] == "int8 units" and "decoded" in kernels["weights x values"]


@pytest.mark.parametrize("values", ["turboquant:2:trellis", "polarquant"])
def test_codes_that_no_kernel_writes_have_none_in_the_list(values, tmp_path, monkeypatch):
    graphs = []
    monkeypatch.setattr(Dump, "graphs", lambda self, before, after, sites: graphs.append((after, sites)))
    dumped(tmp_path, Layer(), *next(calls()), inner="eager", values=values)
    sources, plain = kernel_sources(*graphs[0]), values.replace(":", "_")
    assert "append_turboquant_4_32" in sources and not [what for what in sources if re.match(rf"append.*{plain}", what)]
    assert f"decode_{plain}_32" in sources and [what for what in sources if what.startswith("attend_")]


def test_texts_of_a_graph_are_kept_where_somebody_asks_and_needs_no_folder():
    def run():
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(Layer(), backend="turboquant", options={**CODECS, "inner": "eager"})(*next(calls()))
        return tqcompile.report().graphs[-1]

    assert run().texts is None
    with texts_kept(), texts_kept():
        texts = run().texts
    assert run().texts is None
    # The graph's code without comments and without what names the memory that is given back.
    before, after = (
        {line.split(" = ")[0].strip().split(":")[0] for line in text.splitlines() if " = " in line}
        for text in (texts.before, texts.after)
    )
    assert "scaled_dot_product_attention(" in texts.before and "torch.ops.tqcompile.attend" in texts.after
    assert texts.gone and texts.new and not texts.gone & texts.new and not texts.changed & (texts.gone | texts.new)
    written = before & texts.gone
    assert len(written) >= 3 and not written & after
    assert {"append_turboquant_4_32", "append_step_turboquant_4_q8_0_32_32", "decode_q8_0_32"} <= texts.kernels.keys()
    assert all(ast.parse(text).body for text in texts.kernels.values())


def test_a_graph_that_the_passes_left_alone_has_equal_texts():
    with texts_kept():
        torch.compile(torch.sin, backend="turboquant", options={"inner": "eager"})(torch.ones(2))
    (graph,) = tqcompile.report().graphs
    assert graph.texts.before == graph.texts.after and not graph.texts.gone | graph.texts.new | graph.texts.changed
    assert graph.texts.kernels == {} and graph.facts == ()
