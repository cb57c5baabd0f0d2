"""What is kept of a compiled kernel is launched for arguments that Triton would have compiled it for, and no others."""

from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from tqcompile.kernels import launcher


@triton.jit(do_not_specialize=["length", "scale"])
def kernel(x, out, scale, length, row, column, WIDTH: tl.constexpr, num_warps: tl.constexpr = 1):
    pass


class Triton:
    """Triton without a device: what it compiles a kernel to is what it sees of the arguments, and the options."""

    def __init__(self):
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.see = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.device, self.launches = 0, []

    def seen(self):
        return self.device, tuple(self.see(*self.arguments, **self.options)[1]), self.options

    def run(self, *arguments, grid, warmup, **options):
        assert (arguments, grid, options, warmup) == (self.arguments, self.grid, self.options, False)
        self.launches.append("asked")
        return Compiled(self)


# The stream that is current, and what a launch needs of a compiled kernel.
STREAM, PARTS = 7, ("function", "metadata")


class Compiled(CompiledKernel):
    def __init__(self, by):
        self.by, self.seen = by, by.seen()
        self.function, self.packed_metadata = PARTS

    def __del__(self):
        """Nothing was loaded."""

    def run(self, x_blocks, y_blocks, z_blocks, stream, function, metadata, launch, enter, leave, *given):
        assert ((x_blocks, y_blocks, z_blocks), stream) == (self.by.grid, STREAM)
        assert ((function, metadata), launch, enter, leave) == (PARTS, None, None, None)
        x, out, *others = self.by.arguments
        assert given == (x.data_ptr(), out.data_ptr(), *others, self.by.options["num_warps"])
        assert self.seen == self.by.seen()
        self.by.launches.append("kept")


# What a launch is made of, and what becomes of it next: a change of one thing at a time.
BASE = {
    "dtypes": (torch.float32, torch.float16),
    "bytes": (0, 0),
    "scale": 0.5,
    "length": 100,
    "row": 100,
    "column": 16,
    "width": 64,
    "options": {"num_warps": 2, "maxnreg": 128},
    "grid": (3, 2, 1),
    "device": 0,
}
NUMBERS = st.sampled_from([0, 1, 2, 8, 16, 17, 48, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 16])
CHANGES = {
    "dtypes": st.tuples(*[st.sampled_from([torch.float32, torch.float16, torch.uint8])] * 2),
    "bytes": st.tuples(*[st.sampled_from([0, 4, 8, 16, 32])] * 2),
    "scale": st.sampled_from([0.5, 0.25, 1.0, 1]),
    "length": NUMBERS,
    "row": NUMBERS,
    "column": NUMBERS,
    "width": st.sampled_from([64, 128]),
    "options": st.builds(dict, num_warps=st.sampled_from([1, 2]), maxnreg=st.sampled_from([128, 255])),
    "grid": st.tuples(*[st.integers(1, 3)] * 3),
    "device": st.sampled_from([0, 1]),
}
CHANGE = st.sampled_from(sorted(CHANGES)).flatmap(lambda name: st.tuples(st.just(name), CHANGES[name]))


class Launches:
    """A module with that kernel, and what launches of it came to."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.triton, self.built = Triton(), ModuleType("built")
        self.built.kernel = kernel
        patch.setattr(triton.JITFunction, "run", lambda function, *a, **k: self.triton.run(*a, **k))
        patch.setattr(torch.cuda, "current_device", lambda: self.triton.device)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)

    def launch(self, **changes):
        call = BASE | changes
        rows = [torch.empty(256, dtype=torch.uint8)[start:][:64] for start in call["bytes"]]
        tensors = tuple(row.view(dtype) for row, dtype in zip(rows, call["dtypes"]))
        numbers = tuple(call[name] for name in ("scale", "length", "row", "column"))
        self.triton.arguments = (*tensors, *numbers, call["width"])
        self.triton.grid, self.triton.options, self.triton.device = call["grid"], call["options"], call["device"]
        launcher.launch(self.built, "kernel", call["grid"], tensors, numbers, (call["width"],), **call["options"])
        return self.triton.launches[-1]


@given(changes=st.lists(CHANGE, max_size=40))
def test_a_kept_kernel_is_one_for_such_arguments(changes):
    with pytest.MonkeyPatch.context() as patch:
        launches, call = Launches(patch), {}
        for name, value in changes:
            launches.launch(**call)
            call[name] = value
            launches.launch(**call)
            assert launches.launch(**call) == "kept"


@pytest.mark.parametrize(
    ("came_to", "changes"),
    [
        ("kept", {"scale": 0.25, "length": 101}),
        ("kept", {"row": 20, "column": 48}),
        ("kept", {"bytes": (32, 16)}),
        ("kept", {"grid": (1, 1, 7)}),
        ("asked", {"bytes": (0, 8)}),
        ("asked", {"dtypes": (torch.float16, torch.float16)}),
        ("asked", {"scale": 1}),
        ("asked", {"length": 2**31}),
        ("asked", {"row": 1}),
        ("asked", {"row": 32}),
        ("asked", {"width": 128}),
        ("asked", {"options": {"num_warps": 2, "maxnreg": 255}}),
        ("asked", {"device": 1}),
    ],
    ids=str,
)
def test_triton_is_asked_for_what_it_sees(came_to, changes, monkeypatch):
    launches = Launches(monkeypatch)
    assert (launches.launch(), launches.launch(), launches.launch(**changes)) == ("asked", "kept", came_to)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_launches_are_left_to_triton(name, monkeypatch):
    launches, hook = Launches(monkeypatch), knobs.HookChain()
    launches.launch()
    monkeypatch.setattr(Compiled, "__getitem__", lambda *a: lambda *given: launches.triton.launches.append("by Triton"))
    assert launches.launch() == "kept"
    hook.add(print)
    for some in (hook, print):
        monkeypatch.setattr(knobs.runtime, name, some)
        assert launches.launch() == "by Triton"
    monkeypatch.setattr(knobs.runtime, name, None)
    assert launches.launch() == "kept"


def test_a_call_is_launched_again_for_tensors_elsewhere(monkeypatch):
    """What it was compiled for aligned ones is not for others."""
    launches, numbers = Launches(monkeypatch), (0.5, 100, 100, 16)
    call = launcher.Call(launches.built, "kernel", (3, 2), numbers, (64,), **BASE["options"])
    launches.triton.grid, launches.triton.options = (3, 2, 1), BASE["options"]
    for start, came_to in ((0, "asked"), (32, "kept"), (4, "asked"), (0, "kept"), (20, "kept")):
        tensors = (torch.empty(256, dtype=torch.uint8)[start:][:64].view(torch.float32), torch.empty(4).half())
        launches.triton.arguments = (*tensors, *numbers, 64)
        call(tensors)
        assert launches.triton.launches[-1] == came_to


def test_bytes_are_launched_for_bool(monkeypatch):
    launches, numbers = Launches(monkeypatch), (0.5, 100, 100, 16)
    marks, out = torch.zeros(64, dtype=torch.bool), torch.empty(4)
    seen = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda function, *a, **k: seen.append(a))
    launcher.launch(launches.built, "kernel", (1,), (marks, out), numbers, (64,), **BASE["options"])
    assert seen[0][0].dtype == torch.uint8 and seen[0][0].data_ptr() == marks.data_ptr()


def test_modules_share_nothing(monkeypatch):
    assert [Launches(monkeypatch).launch() for _ in range(2)] == ["asked"] * 2


def test_what_is_still_being_compiled_is_not_kept(monkeypatch):
    launches = Launches(monkeypatch)
    monkeypatch.setattr(triton.JITFunction, "run", lambda *a, **k: launches.triton.launches.append("asked") or object())
    assert [launches.launch() for _ in range(2)] == ["asked"] * 2


def test_on_an_amd_gpu_triton_is_asked_each_time(monkeypatch):
    """It looks at the size of tensors there."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    launches = Launches(monkeypatch)
    assert [launches.launch() for _ in range(3)] == ["asked"] * 3
