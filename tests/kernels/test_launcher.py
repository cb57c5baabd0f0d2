"""What is kept of a compiled kernel is launched for arguments that Triton would have compiled it for, and no others."""

from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from tqcompile.kernels import launcher


@triton.jit(do_not_specialize=["length", "scale"])
def kernel(x, out, scale, length, row, column, WIDTH: tl.constexpr, num_warps: tl.constexpr = 1):
    pass


NUMBERS = st.sampled_from([0, 1, 2, 16, 17, 48, 2**31 - 1, 2**31, 2**31 + 16])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.uint8])


class Triton:
    """Triton without a device: what it compiles a kernel to is what it sees of the arguments."""

    def __init__(self):
        self.see = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        self.arguments, self.launches = None, []

    def seen(self):
        return tuple(self.see(*self.arguments, num_warps=2)[1])

    def run(self, *arguments, grid, warmup, **options):
        assert arguments == self.arguments and options == {"num_warps": 2} and grid == (3, 1, 1) and not warmup
        self.launches.append("asked")
        return Compiled(self, self.seen())


class Compiled:
    def __init__(self, by, seen):
        self.by, self.seen = by, seen

    def __getitem__(self, grid):
        assert grid == (3, 1, 1)
        return self.launch

    def launch(self, *given):
        tensors = self.by.arguments[:2]
        assert given == (*[tensor.data_ptr() for tensor in tensors], *self.by.arguments[2:], 2)
        assert self.seen == self.by.seen()
        self.by.launches.append("kept")


class Launches:
    """A module with that kernel, and what launches of it came to."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.triton, self.built = Triton(), ModuleType("built")
        self.built.kernel = kernel
        patch.setattr(triton.JITFunction, "run", lambda function, *a, **k: self.triton.run(*a, **k))

    def launch(self, tensors=None, numbers=(0.5, 100, 100, 16), width=64):
        tensors = (torch.empty(64),) * 2 if tensors is None else tensors
        self.triton.arguments = (*tensors, *numbers, width)
        launcher.launch(self.built, "kernel", (3,), tensors, numbers, (width,), num_warps=2)
        return self.triton.launches[-1]


@given(
    calls=st.lists(
        st.tuples(
            st.tuples(DTYPES, DTYPES),
            st.tuples(st.sampled_from([0, 4, 16]), st.sampled_from([0, 4, 16])),
            st.tuples(st.sampled_from([0.5, 1.0, 1]), NUMBERS, NUMBERS, NUMBERS),
            st.sampled_from([64, 128]),
        ),
        max_size=30,
    )
)
def test_a_kept_kernel_is_one_for_such_arguments(calls):
    with pytest.MonkeyPatch.context() as patch:
        launches = Launches(patch)
        for dtypes, offsets, numbers, width in calls:
            tensors = tuple(torch.empty(64, dtype=dtype)[offset:] for dtype, offset in zip(dtypes, offsets))
            launches.launch(tensors, numbers, width)


def test_triton_is_asked_once(monkeypatch):
    launches = Launches(monkeypatch)
    assert launches.launch() == "asked"
    assert launches.launch(numbers=(0.25, 101, 100, 16)) == "kept", "Triton does not look at these values"
    assert launches.launch(tensors=(torch.empty(80)[16:], torch.empty(64))) == "kept"
    assert launches.launch(tensors=(torch.empty(80)[1:], torch.empty(64))) == "asked"
    assert launches.launch(numbers=(1, 100, 100, 16)) == "asked"
    assert launches.launch(numbers=(0.5, 100, 1, 16)) == "asked"
    assert launches.launch(width=128) == "asked"
    assert Launches(monkeypatch).launch() == "asked", "it is another module"


def test_on_an_amd_gpu_triton_is_asked_each_time(monkeypatch):
    """It looks at the size of tensors there."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    launches = Launches(monkeypatch)
    assert [launches.launch() for _ in range(3)] == ["asked"] * 3
