"""How much longer compiling takes with this backend, and how much of that its passes are: one deep, narrow model."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tqcompile import report
from tqcompile.backend import turboquant
from tqcompile.report import clear
from tqcompile.sweep.build import Architecture, make
from tqcompile.sweep.scenarios import Scenario, play

LAYERS = 32
# A prefill and a step: two graphs.
CALLS = Scenario("compile", (12, 1))
INNER = "inductor"


@dataclass(frozen=True)
class Times:
    """Seconds: compiled densely, compiled with this backend, and in its passes; over so many graphs of so many layers.

    A model's first run over its second, which compiles nothing.
    """

    dense: float
    ours: float
    passes: float
    graphs: int
    layers: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.graphs} graphs: dense {INNER} compiles in {self.dense:.1f} s, this one in "
            f"{self.ours:.1f} s; its passes take {self.passes:.2f} s, {self.passes / self.dense:.1%} of dense"
        )


def measure(architecture: Architecture, layers: int = LAYERS) -> Times:
    """Compile a tiny model of so many layers densely and compressed, with no cache of compiled code.

    Raises:
        ValueError: the architecture has fewer layers, or keeps no cache that is compressed.
    """
    model = make(architecture, {"layers": layers})
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    if depth != layers:
        raise ValueError(f"{architecture.name} has {depth} layers of {layers}; name one whose default has more")
    with torch.compiler.config.patch(force_disable_caches=True):
        # What Inductor builds once in a process counts for neither.
        _compiling(make(architecture, {"layers": 2}), INNER)
        dense = _compiling(model, INNER)
        ours = _compiling(model, turboquant(inner=INNER))
    found = report(model)
    if not found.caches and not any(graph.sites for graph in found.graphs):
        raise ValueError(f"{architecture.name}: no cache of it is compressed; name an architecture that has one")
    return Times(dense, ours, sum(graph.seconds for graph in found.graphs), len(found.graphs), layers)


def _compiling(model, backend: str | Callable) -> float:
    torch.compiler.reset()
    clear()
    call, seconds = torch.compile(model, backend=backend), []
    for _ in range(2):
        start = time.perf_counter()
        play(CALLS, model, call)
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]
