"""A second process finds in Inductor's caches whatever the first one compiled."""

import json
import os
import subprocess
import sys

import torch
from models import EMBED

from tqcompile import backend, formats
from tqcompile.passes import rewrite

CODECS = ("turboquant:4", "q8_0")


def talk() -> dict:
    """A conversation with a small model, compiled by Inductor: what it said, and what the compilers' caches did."""
    from conversations import conversations
    from models import Shape

    torch.set_num_threads(1)
    ours, _ = conversations("tuples", Shape(layers=1), CODECS, inner="inductor")
    said = [ours.feed(torch.randn(2, tokens, EMBED)).double().sum().item() for tokens in (5, 1, 1)]
    counters = torch._dynamo.utils.counters
    found = {**counters["inductor"], **counters["aot_autograd"]}
    return {"said": said, **{name: count for name, count in found.items() if "cache" in name}}


def in_a_process_of_its_own(folder) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_warm_start_compiles_nothing_anew(tmp_path):
    cold, warm = in_a_process_of_its_own(tmp_path), in_a_process_of_its_own(tmp_path)
    assert not any("bypass" in name for name in (*cold, *warm)), (cold, warm)
    assert not any("miss" in name for name in warm), warm
    # What the backend compiles for itself, to decode and encode rows, passes AOTAutograd by.
    assert warm["fxgraph_cache_hit"] > warm["autograd_cache_hit"] == cold["autograd_cache_miss"]
    assert warm["said"] == cold["said"]


def marked(codec: str) -> str:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(rewrite.encode, (graph.placeholder("y"), codec)))
    (key,) = backend._cacheable(torch.fx.GraphModule({}, graph)).values()
    return key


def test_what_is_found_was_compiled_of_the_same_sources_and_codecs(monkeypatch):
    key = marked("turboquant:4")
    assert key == marked("turboquant:4") != marked("turboquant:3")
    monkeypatch.setattr(formats, "codec", lambda name: formats.REGISTRY["turboquant:2"])
    assert marked("turboquant:4") != key
    monkeypatch.undo()
    monkeypatch.setattr(backend, "source_digest", lambda: "others")
    assert marked("turboquant:4") != key


if __name__ == "__main__":
    print(json.dumps(talk()))
