"""Where the kernels of this folder's tests run: on a GPU, or on CPU tensors through Triton's interpreter."""

from types import SimpleNamespace

import emulate
import pytest
import torch
from cases import TOLERANCE
from hypothesis import HealthCheck, settings

from tqcompile.kernels import attend, chunks, integer, tune

settings.register_profile("kernels", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def asked_anew():
    """Which kernel takes a call is not kept from one test to the next: some have others take it."""
    attend.kernel_of.cache_clear()
    yield
    attend.kernel_of.cache_clear()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """`cpu` is the interpreter; `cuda` runs under `-m gpu` alone."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


KERNELS = ("cuda-portable", "cuda-int8", "cuda-chunk")


@pytest.fixture(params=["cpu", *(pytest.param(kernel, marks=pytest.mark.gpu) for kernel in KERNELS)])
def attending_device(request, monkeypatch):
    """The interpreter, and on a GPU all kernels that attend: the others have no interpreter."""
    device, _, kernel = request.param.partition("-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if kernel == "chunk":
        monkeypatch.setattr(tune, "chunk_least_rows", lambda heads: 1)
    else:
        monkeypatch.setattr(chunks, "takes", lambda *arguments: False)
    if kernel == "int8":
        # Fifteen bits of q and of the weights, whatever the dtype of q.
        monkeypatch.setitem(TOLERANCE, torch.float32, 4e-4)
    else:
        monkeypatch.setattr(integer, "takes", lambda *arguments: False)
    return device


@pytest.fixture
def emulated(monkeypatch):
    """The kernel on int8 units takes all calls, and the emulator runs it."""
    calls = []

    def module(keys, values, reader, folder):
        calls.append((keys, values))
        text = integer.source(keys, values, reader)
        return SimpleNamespace(**{name: emulate.Kernel(text, name) for name in integer.KERNEL.values()})

    monkeypatch.setattr(integer, "takes", lambda *a: True)
    monkeypatch.setattr(integer, "prepared", integer.prepared.__wrapped__)
    monkeypatch.setattr(integer, "module", module)
    monkeypatch.setitem(TOLERANCE, torch.float32, 4e-4)
    yield
    assert calls
