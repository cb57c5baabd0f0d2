"""What every test starts from: nothing compiled, no records, one thread."""

import gc
import logging
import pathlib
import sys
import zlib
from collections import defaultdict

import pytest
import torch
from hypothesis import HealthCheck, settings

from tqcompile import cpu
from tqcompile.report import clear

sys.path.insert(0, str(pathlib.Path(__file__).parent))

# Structured traces go nowhere here, and pytest would format each of them.
logging.getLogger("torch.__trace").propagate = False

# Small tensors gain nothing from more threads, and lose a lot where other programs use the cores.
torch.set_num_threads(1)

settings.register_profile("tests", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a grid that is `thinned` by n, cases that have every value of every parameter run on a CPU, and one of n: the
    others are slow."""
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thinned") and not item.get_closest_marker("gpu"):
            grids[item.nodeid.partition("[")[0]].append(item)
    for cases in grids.values():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        wanted, seen, left = len(cases) / cases[0].get_closest_marker("thinned").args[0], set(), []
        for item in cases:
            values = {(name, repr(value)) for name, value in item.callspec.params.items()}
            if values <= seen:
                left.append(item)
            seen |= values
        covering = len(cases) - len(left)
        for item in left[max(0, round(wanted) - covering) :]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def collected():
    """What was frozen for the tests of a file is looked at again, lest what died since is kept."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_compiler(collected):
    """No graph, record or seed is carried from one test to the next."""
    torch._dynamo.reset()
    cpu.use_row_compiler(None)
    clear()
    torch.manual_seed(0)
    # A graph over a growing cache collects at its first call. Of the million objects that were imported before, and are
    # kept, that takes longer than compiling: the collector looks at those of this test only.
    gc.collect()
    gc.freeze()
    yield
    torch._dynamo.reset()
