"""Launches generated kernels without asking Triton each time what they are compiled for.

`JITFunction.run` looks at every argument of every launch, and takes several times as long as the launch. It looks at a
tensor's dtype, at whether it begins at a multiple of 16, and at numbers: where these are as they were before, so is
what the kernel was compiled to. Settings that it reads from the environment, as TRITON_DEBUG, are those of the first
such launch. On an AMD GPU it also looks at how long a tensor is, and is asked each time.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
import triton
from triton import knobs

# From here on a number has another type, also where Triton does not look at its value.
LONG = 2**31


class Call:
    """A launch of the kernel `name` of a generated module over `grid`, but for the tensors: their kinds (`kind_of`) are
    those of its first call, so that who keeps it keeps it for such tensors.

    These are its first parameters, then come `numbers`, then `constants` that it is compiled for; `options` are
    Triton's. Kernels of Triton's interpreter, and all on an AMD GPU, are launched by Triton each time.
    """

    def __init__(
        self,
        built: ModuleType,
        name: str,
        grid: tuple[int, ...],
        numbers: tuple[int | float, ...] = (),
        constants: tuple = (),
        **options,
    ):
        self.kernel, self.grid = getattr(built, name), (*grid, 1, 1)[:3]
        self.given, self.options = (*numbers, *constants), options
        self.is_kept = isinstance(self.kernel, triton.JITFunction) and torch.version.hip is None
        if self.is_kept:
            # Gluon's kernels have an option among their parameters, the last one.
            self.behind = [options[param.name] for param in self.kernel.params if param.name in options]
            params = self.kernel.params[len(self.kernel.params) - len(self.given) - len(self.behind) :]
            seen = (_seen(number, param) for number, param in zip(numbers, params))
            self.seen = built, name, (*seen, *constants, *options.items())
            self.kept = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Launch it on the current device and stream; kernels see bool as bytes."""
        if not self.is_kept:
            self._asked(tensors)
            return
        if self.kept is None:
            self.kept = _kept(*self.seen, tuple(map(kind_of, tensors)))
        addresses, device = list(map(torch.Tensor.data_ptr, tensors)), torch.cuda.current_device()
        key = device, *[address % 16 == 0 for address in addresses]
        compiled = self.kept.get(key)
        if compiled is None:
            compiled = self._asked(tensors)
            # Not what is still being compiled.
            if isinstance(compiled, triton.compiler.CompiledKernel):
                self.kept[key] = compiled
        elif _calls(knobs.runtime.launch_enter_hook) or _calls(knobs.runtime.launch_exit_hook):
            compiled[self.grid](*addresses, *self.given, *self.behind)
        else:
            # What Triton does at the end of its own launches.
            stream, hooks = torch._C._cuda_getCurrentRawStream(device), (None, None, None)
            given = *hooks, *addresses, *self.given, *self.behind
            compiled.run(*self.grid, stream, compiled.function, compiled.packed_metadata, *given)

    def _asked(self, tensors: Sequence[torch.Tensor]):
        tensors = [tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in tensors]
        return self.kernel[self.grid](*tensors, *self.given, **self.options)


def kind_of(tensor: torch.Tensor | None) -> tuple[torch.dtype, torch.device] | None:
    """What a kernel is compiled for of a tensor, but for its place, and where that is; None for none."""
    return None if tensor is None else (tensor.dtype, tensor.device)


def launch(built: ModuleType, name: str, grid: tuple[int, ...], tensors: Sequence[torch.Tensor], *others, **options):
    """A `Call` that is made once."""
    Call(built, name, grid, *others, **options)(tensors)


def _calls(hook) -> bool:
    """Whether a hook of Triton's calls anything: none is one, and so is an empty chain."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _seen(number: int | float, param) -> tuple:
    """What Triton sees of a number."""
    known = () if param.do_not_specialize else (number == 1, number % 16 == 0)
    return type(number), number >= LONG, *known


@lru_cache(maxsize=4096)
def _kept(built: ModuleType, name: str, seen: tuple, kinds: tuple) -> dict[tuple, triton.compiler.CompiledKernel]:
    """What a kernel was compiled to for such numbers, constants and tensors, by their places and the device."""
    return {}
