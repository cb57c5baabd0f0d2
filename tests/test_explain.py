"""`python -m tqcompile explain`: tiny models and scripts in this process; what it prints, and its page and JSON."""

import contextlib
import io
import json
import linecache
import os
import pathlib
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from checkpoints import new_cache, prompt, step, tiny
from transformers import Gemma2Config, LlamaConfig

import tqcompile
from tqcompile.__main__ import main
from tqcompile.explain import sizes
from tqcompile.explain.section import line, plain, together
from tqcompile.options import ENVIRONMENT

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PAIR = ("--keys", "turboquant:4", "--values", "q8_0")
# Two heads of 16 numbers: 8 bytes of codes and one scalar for keys; 16 bytes and one scalar for values.
KEYS, VALUES, DENSE = 2 * (8 + 2), 2 * (16 + 2), 2 * 16 * 4


def explain(*arguments):
    """Exit status, standard output and standard error of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["explain", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def folder(tmp_path, config=LlamaConfig, **facts):
    config(**{**SIZES, **facts}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Two of four layers with both caches: (text, JSON, page)."""
    place = tmp_path_factory.mktemp("llama")
    files = place / "facts.json", place / "page.html"
    arguments = ("--layers", 2, "--context", 1000, "--batch", 3, "--json", files[0], "--html", files[1])
    status, text, _ = explain(folder(place, num_hidden_layers=4), *PAIR, *arguments)
    assert status == 0
    return text, json.loads(files[0].read_text()), files[1].read_text()


def caches(section, form=None):
    found = [cache for graph in section["graphs"] for cache in graph["caches"]]
    return [cache for cache in found if form in (None, cache["form"])]


def code_at(where, root):
    path, number = re.fullmatch(r"(.*):(\d+)", where).groups()
    return linecache.getline(str(pathlib.Path(root) / path), int(number))


def test_the_head_says_what_ran_on_what(llama):
    head = llama[0].split("\n\n")[0]
    assert "LlamaForCausalLM, 2 of 4 layers, sdpa attention, float32, random weights" in head
    assert "keys turboquant:4, values q8_0, inner eager" in head
    for what in (f"torch {torch.__version__}", "triton ", "transformers ", "tqcompile ", "CPU"):
        assert what in head


FORMS = {"dynamic cache": ("append", "cat"), "static cache": ("in_place", "index_copy_")}


@pytest.mark.parametrize("title", FORMS)
def test_each_kind_of_cache_has_its_form_its_lines_and_its_calls(llama, title):
    section = next(section for section in llama[1]["sections"] if section["title"] == title)
    calls = [graph["compiled_by"] for graph in section["graphs"]]
    assert calls[:2] == ["prefill of 8 tokens", "step 1"] and section["trouble"] == ""
    form, operator = FORMS[title]
    assert {cache["form"] for cache in section["graphs"][0]["caches"]} == {"create"}
    for graph in section["graphs"][1:]:
        assert graph["reads_of_codes"] == 2 and len(graph["caches"]) == 4
    found = caches(section, form)
    root = pathlib.Path(__import__("transformers").__file__).parent.parent
    for cache in found:
        assert cache["codec"] == {"keys": "turboquant:4", "values": "q8_0"}[cache["role"]]
        (write,), (read,) = cache["writes"], cache["reads"]
        assert write["operator"] == operator and operator in code_at(write["where"], root)
        assert (read["kind"], read["over"]) == ("attend", "codes")
        assert "scaled_dot_product_attention" in code_at(read["where"], root)
    assert f"cache.layers[0-1].keys: {form}, keys as turboquant:4, 2 caches of 2 heads x 16 dims" in llama[0]


def test_bytes_of_a_token_are_those_of_live_storages(llama):
    """The static cache of a run takes what the explanation says for as many tokens as it has room for."""
    model, room, rows = tiny(), 40, 2
    options = {"keys": "turboquant:4", "values": "q8_0", "inner": "eager"}
    compiled, cache = torch.compile(model, backend="turboquant", options=options), new_cache("static", model, room)
    for tokens in (4, 1):
        step(compiled, prompt(rows, tokens), cache)
    live = tqcompile.report(model)
    (graph,) = (graph for graph in llama[1]["sections"][1]["graphs"] if graph["reads_of_codes"])
    kept = sum(cache["kept_bytes_per_token"] for cache in graph["caches"])
    dense = sum(cache["dense_bytes_per_token"] for cache in graph["caches"])
    assert kept * room * rows == live.compressed_bytes and dense * room * rows == live.dense_bytes
    assert kept == 2 * (KEYS + VALUES) and dense == 4 * DENSE


@pytest.mark.parametrize("codec", tqcompile.formats.REGISTRY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_every_codec_are_those_of_its_layout(codec, dtype):
    layout = tqcompile.layout.layout_of(tqcompile.formats.codec(codec), 80, dtype, "cpu")
    assert sizes.bytes_per_token(codec, 3, 80, dtype) == (3 * 80 * dtype.itemsize, 3 * layout.bytes_per_token)


def test_totals_are_of_the_context_and_the_batch_and_of_all_layers(llama):
    for section in llama[1]["sections"]:
        part, whole = section["totals"]
        assert part["kept_per_token"] == 2 * (KEYS + VALUES) and part["dense_per_token"] == 4 * DENSE
        assert part["kept"] == 3000 * part["kept_per_token"] and part["dense"] == 3000 * part["dense_per_token"]
        assert whole["what"] == "all 4 layers"
        for name in ("caches", "kept_per_token", "dense_per_token", "kept", "dense"):
            assert whole[name] == 2 * part[name]
    assert f"{3000 * 4 * (KEYS + VALUES):,}" in llama[0]


VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in the order they were opened, and gathers what a test looks at."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.outside, self.text, self.marked = [], [], [], "", {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.outside += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class")))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        self.text += data
        for _, kind in self.open:
            self.marked[kind] = self.marked.get(kind, "") + data


def test_the_page_is_whole_and_holds_both_graphs_and_the_kernels(llama):
    page = Page(llama[2])
    assert page.open == [] and page.outside == [] and "script" not in page.tags and "@import" not in llama[2]
    assert llama[2].startswith("<!DOCTYPE html>") and "http" not in re.sub("#.*", "", page.text)
    graphs = sum(len(section["graphs"]) for section in llama[1]["sections"])
    kernels = sum(len({name for graph in s["graphs"] for name in graph["kernels"]}) for s in llama[1]["sections"])
    assert kernels >= 8 and page.tags.count("details") == page.tags.count("summary") == graphs + kernels
    assert "scaled_dot_product_attention(" in page.marked["gone"] and "index_copy_" in page.marked["gone"]
    assert "torch.ops.tqcompile.attend.default(" in page.marked["new"]
    assert "cache_layers_0_keys_codes: " in page.marked["new"]
    assert "torch.ops.tqcompile" not in page.marked["gone"] + page.marked["changed"]
    for kernel in ("def append_tokens(", "def append_step_rows(", "def attend_split(", "def decode_tokens("):
        assert kernel in page.text
    for cell in ("cache.layers[0-1].keys", "turboquant:4", f"{3000 * 4 * (KEYS + VALUES):,}"):
        assert cell in page.text


@pytest.mark.parametrize(("kind", "most"), [("dynamic", 511), ("static", 512)])
def test_a_window_slides_in_the_run_and_keeps_no_more_than_itself(kind, most, tmp_path):
    model = folder(tmp_path, Gemma2Config, num_hidden_layers=2, head_dim=16, sliding_window=512)
    status, text, _ = explain(model, *PAIR, "--cache", kind, "--context", 1000, "--json", tmp_path / "facts.json")
    assert status == 0 and "sliding_window 9 instead of 512, so that it slides in this run" in text
    (section,) = json.loads((tmp_path / "facts.json").read_text())["sections"]
    assert [graph["compiled_by"] for graph in section["graphs"]][-1] == "step 2"
    (total,) = section["totals"]
    dense = [cache for cache in section["graphs"][-1]["caches"] if cache["codec"] is None]
    kept = KEYS + VALUES if not dense else 2 * DENSE
    assert total["dense"] == (1000 + most) * 2 * DENSE and total["kept"] == 1000 * (KEYS + VALUES) + most * kept


def test_a_model_whose_caches_stay_dense_says_why_and_where_and_strict_does_not_stop_it(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "strict=1,keys=q8_0")
    model = folder(tmp_path, num_hidden_layers=1, dtype="float64")
    status, text, _ = explain(model, "--cache", "static", "--json", tmp_path / "facts.json")
    assert status == 0 and "keys q8_0, values turboquant:3" in text and "float64" in text
    (section,) = json.loads((tmp_path / "facts.json").read_text())["sections"]
    refused = section["graphs"][-1]["caches"]
    assert {cache["name"].rpartition("].")[2] for cache in refused} == {"keys", "values"}
    for cache in refused:
        assert (cache["form"], cache["codec"]) == ("dense", None) and "float64" in cache["reason"] and cache["remedy"]
        assert cache["kept_bytes_per_token"] == cache["dense_bytes_per_token"] == 2 * DENSE
        assert re.search(rf"{cache['reason']} +{cache['refused_at']} ", text.partition("left dense:")[2])


def test_layers_of_a_kind_that_did_not_run_are_not_guessed(tmp_path):
    model = folder(tmp_path, Gemma2Config, num_hidden_layers=4, head_dim=16)
    _, text, _ = explain(model, "--cache", "static", "--layers", 1)
    assert "1 of 4 layers" in text and "all 4 layers" not in text
    _, text, _ = explain(model, "--cache", "static", "--layers", 2)
    assert re.search(r"all 4 layers +8 ", text)


def test_eager_attention_is_one_reader_of_codes(tmp_path):
    options = ("--preset", "quality", "--cache", "static", "--attention", "eager")
    status, text, _ = explain(folder(tmp_path, num_hidden_layers=1), *options)
    assert status == 0 and "eager attention" in text and "keys q8_0, values q8_0" in text
    assert re.search(r"read +attend over codes +transformers/models/llama/modeling_llama.py:\d+", text)
    assert "logits over codes" not in text and "mix over codes" not in text


def test_a_model_that_stops_is_explained_until_then(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.StaticCache.__init__", lambda *a, **k: (_ for _ in ()).throw(KeyError("no room")))
    status, text, _ = explain(folder(tmp_path, num_hidden_layers=1))
    assert status == 1 and "prefill of 8 tokens stopped with KeyError: 'no room'" in text
    assert "cache.layers[0].keys: append" in text


def test_a_script_runs_as_it_would_by_itself():
    argv, search, settings = sys.argv, sys.path[:], os.environ.get(ENVIRONMENT)
    script = EXAMPLES / "hand_written.py"
    status, text, printed = explain(script, *PAIR, "--context", 100, "--arguments", "--tokens", 2, "--inner", "eager")
    assert status == 0 and "2 tokens: [" in printed and "2 tokens: [" not in text
    assert (sys.argv, sys.path, os.environ.get(ENVIRONMENT)) == (argv, search, settings)
    for role, codec in (("k", "turboquant:4"), ("v", "q8_0")):
        found = re.search(rf"self\.attention\.0-1\.{role}_cache: in_place, \w+ as {codec}.*\n.*\n.*\n", text)[0]
        write, read = re.findall(r"hand_written\.py:(\d+)", found)
        assert f"self.{role}_cache[:, :, positions] = {role}" in linecache.getline(str(script), int(write))
        assert "scaled_dot_product_attention(" in linecache.getline(str(script), int(read))
    per_token = 2 * 4 * (64 // 2 + 2) + 2 * 4 * (64 + 4)
    assert f"{per_token:,}" in text and f"{100 * per_token:,}" in text
    assert "attend_turboquant_4_q8_0_64_64_bool_mask" in text


REFUSED = """\
import torch
from torch.nn.functional import scaled_dot_product_attention as attend


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(1, 2, 8, 16))
        self.register_buffer("v_cache", torch.zeros(1, 2, 8, 16))
        self.register_buffer("latent", torch.zeros(1, 8, 16))

    def forward(self, q, k, v, at):
        self.k_cache[:, :, at] = k
        self.k_cache.mul_(0.5)
        self.v_cache[:, :, at] = v
        self.latent[:, at] = v[:, 0]
        y = attend(q, self.k_cache, self.v_cache)
        return y + self.v_cache.cos().sum() + self.latent.sum()


q, k, v = torch.randn(3, 1, 2, 1, 16)
with torch.no_grad():
    torch.compile(Odd(), backend="turboquant"{options})(q, k, v, torch.tensor([0]))
"""


def written(tmp_path, text):
    (tmp_path / "script.py").write_text(text)
    return tmp_path / "script.py"


def test_a_refused_cache_shows_reason_line_and_remedy_and_readers_that_decode(tmp_path):
    script = written(tmp_path, REFUSED.replace("{options}", ""))
    status, text, _ = explain(script, "--html", tmp_path / "page.html")
    assert status == 0
    place = re.escape(str(script))
    reason = "mul_ writes it in a way that no rule follows"
    assert re.search(rf"self\.k_cache +{reason} +{place}:14 +It works as before", text)
    assert re.search(rf"self\.latent +it has 3 dimensions, .* +{place}:18 +", text)
    assert "self.k_cache: dense, keys, 1 cache of 2 heads x 16 dims in float32" in text
    decoded = text.partition("decoded in front of a reader:")[2]
    assert re.search(rf"self\.v_cache +scaled_dot_product_attention +{place}:17", decoded)
    assert re.search(rf"self\.v_cache +cos +{place}:18", decoded)
    assert "not counted, for nothing says their heads: self.latent" in text
    page = Page((tmp_path / "page.html").read_text())
    assert reason in page.text and "tqcompile.append" in page.marked["new"]
    assert "l_self_buffers_v_cache_[(" in page.marked["gone"] and "l_self_buffers_k_cache_[(" in page.text
    assert "l_self_buffers_k_cache_[(" not in page.marked["gone"] + page.marked["new"]


def test_heads_that_may_be_of_several_sequences_are_said_to_be(tmp_path):
    text = REFUSED.replace("{options}", "").replace("self.latent.sum()", "attend(k[:, 0], self.latent, self.latent)")
    _, text, _ = explain(written(tmp_path, text))
    assert "self.latent: in_place, both as turboquant:5, 1 cache of 1 head x 16 dims" in text
    assert "sequences and heads are one dimension, counted as the heads of one sequence: self.latent" in text


def test_options_of_a_script_stand_over_those_of_the_command(tmp_path):
    script = written(tmp_path, REFUSED.replace("{options}", ', options={"preset": "quality"}'))
    _, text, _ = explain(script, "--preset", "small")
    assert "self.v_cache: in_place, values as q8_0" in text
    small = "keys turboquant:3, values turboquant:2, first 4 and last 64 tokens exact, keys centred, inner eager"
    assert f"{small}; what the script says itself stands over these" in text


def test_a_script_that_compiles_nothing_is_told_what_to_write(tmp_path):
    status, text, printed = explain(written(tmp_path, "import sys\nprint(sys.argv[1:])"), "--arguments", "--html", 3)
    assert status == 1 and printed == "['--html', '3']\n"
    assert "compiled nothing with this backend" in text and 'torch.compile(model, backend="turboquant")' in text


ENDS = {
    "raise KeyError('gone')": "the script stopped with KeyError: 'gone'",
    "raise SystemExit(3)": "the script ended with status 3",
}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_script_compiled_before_it_stopped_is_explained(end, tmp_path):
    script = written(tmp_path, REFUSED.replace("{options}", "") + end)
    status, text, printed = explain(script)
    assert status == 1 and ENDS[end] in text and "self.v_cache: in_place" in text
    assert ("Traceback" in printed) == ("KeyError" in end)


def test_a_script_that_exits_with_zero_is_no_failure(tmp_path):
    status, text, _ = explain(written(tmp_path, REFUSED.replace("{options}", "") + "raise SystemExit"))
    assert status == 0 and "self.v_cache: in_place" in text


def test_graphs_of_one_name_are_told_apart_and_records_that_a_script_forgets_are_not_missed(tmp_path):
    text = REFUSED.replace("{options}", "")
    again = text.partition("class Odd")[2].partition("with torch")[2]
    script = f"from tqcompile.report import clear\nclear()\n{text}\ntorch.compiler.reset()\nwith torch{again}"
    torch.compile(torch.sin, backend="turboquant", options={"inner": "eager"})(torch.ones(2))
    torch.compiler.reset()
    status, text, _ = explain(written(tmp_path, script))
    assert status == 0 and "self.v_cache: in_place, values as turboquant:3" in text
    assert "graphs 0/0, 0/0 (2)\n" in text and re.search(r"0/0 \(2\) +3 +1 +0\n", text)


def test_a_graph_without_a_cache_says_so(tmp_path):
    text = "import torch\ntorch.compile(torch.sin, backend='turboquant')(torch.ones(2))"
    status, text, _ = explain(written(tmp_path, text))
    assert status == 0 and "No graph of this run keeps a cache." in text and "bytes" not in text


WRONG = {
    "no folder": (("./nowhere",), "MODEL ./nowhere: there is no such folder"),
    "no script": (("nowhere.py",), "SCRIPT nowhere.py: there is no such file"),
    "no codec": (
        ("./nowhere", "--keys", "turboqant:4"),
        "--keys='turboqant:4' is unknown; did you mean 'turboquant:4'",
    ),
    "no codec of values": (("./nowhere", "--values", "q8"), "--values='q8' is unknown; did you mean 'q8_0'?"),
    "no preset": (("./nowhere", "--preset", "huge"), "--preset='huge' is unknown"),
    "no tokens": (("./nowhere", "--context", 0), "--context: '0' is not a whole number of 1 or more"),
    "no cache": (("./nowhere", "--cache", "paged"), "--cache: invalid choice: 'paged'"),
    "no place": (
        ("./nowhere", "--html", "./nowhere/page.html"),
        "--html nowhere/page.html: there is no folder nowhere",
    ),
    "no file": (("./nowhere", "--json", "."), "--json .: that is a folder"),
    "layers of a script": ((EXAMPLES / "demo.py", "--layers", 2), "--layers: a script makes its own model and caches"),
    "arguments of a model": (("./nowhere", "--arguments", "x"), "--arguments are a script's"),
    "values of what serves keys": (("./nowhere", "--values", "qjl:1"), "--values='qjl:1': codec 'qjl:1' serves keys"),
    "nothing": ((), "arguments are required: MODEL_OR_SCRIPT"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named_in_one_line(mistake, capsys):
    arguments, words = WRONG[mistake]
    with pytest.raises(SystemExit) as end:
        main(["explain", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and words in err and err.count("\n") == 1


def test_a_folder_that_holds_no_model_is_named(tmp_path, capsys):
    for content, words in (("{}", "has no configuration to read"), ('{"model_type": "t5"}', "no decoder of kind 't5'")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit) as end:
            main(["explain", str(tmp_path)])
        err = capsys.readouterr().err
        assert end.value.code == 2 and f"MODEL {tmp_path}" in err and words in err


def test_more_layers_than_there_are(tmp_path, capsys):
    model = folder(tmp_path, num_hidden_layers=2)
    with pytest.raises(SystemExit):
        main(["explain", str(model), "--layers", "3"])
    assert "--layers 3: this model has 2" in capsys.readouterr().err


def test_names_are_those_a_reader_of_the_model_knows():
    assert plain("L['kwargs']['past_key_values'].layers[3].keys") == "past_key_values.layers[3].keys"
    assert plain("L['self']._modules['blocks']._modules['0']._buffers['k_cache']") == "self.blocks.0.k_cache"
    assert plain("L['past'][0][1]") == "past[0][1]"


def test_names_that_differ_by_a_number_are_one_range():
    assert together(["layers[0].keys"]) == "layers[0].keys"
    assert together(f"layers[{n}].keys" for n in (0, 1, 2, 10, 4)) == "layers[0-2,4,10].keys"
    assert together(["a[0][0]", "a[1][1]"]) == "a[0][0], a[1][1]"
    assert together(["values", "values_1", "values_2", "values_3", "values_4"]) == "values, values_1 ... values_4"


def test_a_line_is_told_below_the_nearest_folder_that_python_finds_it_in():
    where = "/a/b/c/d.py, line 7, in forward"
    assert line(where, ["/a", "/a/b", "/x", ""]) == "c/d.py:7"
    assert line(where, ["/x"]) == "/a/b/c/d.py:7" and line("node add", ["/a"]) == "node add"


def test_the_readme_shows_what_the_command_prints(monkeypatch):
    root = EXAMPLES.parent
    monkeypatch.chdir(root)
    command, shown = re.search(
        r"`python -m tqcompile explain (.*)` prints\n\n```\n(.*?)\n```", (root / "README.md").read_text(), re.DOTALL
    ).groups()
    _, text, _ = explain(*command.split())

    def of_any_machine(printed):
        return [line for line in printed.splitlines() if line.split(" ")[0] not in ("versions", "device", "date")]

    assert of_any_machine(shown) == of_any_machine(text) and len(of_any_machine(shown)) > 20
