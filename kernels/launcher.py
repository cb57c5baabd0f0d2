"""Launches generated kernels, and asks Triton once what each is compiled for.

`JITFunction.run` looks at every argument of every launch, and takes several times as long as the launch. It looks at a
tensor's dtype, at whether it begins at a multiple of 16, and at numbers: where these are as they were before, so is
what the kernel was compiled to.
"""

from collections.abc import Sequence
from functools import cache
from operator import itemgetter
from types import ModuleType

import torch
import triton

# Compiled kernels that are kept of one function: caches that grow have new strides now and then.
MOST_KEPT = 4096
# From here on a number has another type, also where Triton does not look at its value.
LONG = 2**31


def launch(
    built: ModuleType,
    name: str,
    grid: tuple[int, ...],
    tensors: Sequence[torch.Tensor],
    numbers: tuple[int | float, ...] = (),
    constants: tuple = (),
    **options,
) -> None:
    """Run the kernel `name` of a generated module over `grid`, on the current device and stream.

    Its parameters are tensors, then numbers, then constants that it is compiled for; `options` are Triton's.
    """
    _launcher(built, name, len(tensors), len(numbers))(grid, tensors, numbers, constants, options)


class Launcher:
    """A kernel of so many tensors and numbers, and what it was compiled to until now."""

    def __init__(self, kernel, tensors: int, numbers: int):
        self.kernel, self.count = kernel, tensors + numbers
        self.is_compiled = isinstance(kernel, triton.JITFunction)
        self.kept: dict[tuple, tuple] = {}
        params = kernel.params[tensors : self.count] if self.is_compiled else ()
        self.unseen = [place for place, param in enumerate(params) if param.do_not_specialize]
        seen = [place for place in range(len(params)) if place not in self.unseen]
        self.seen = itemgetter(*seen) if seen else lambda numbers: ()

    def __call__(self, grid, tensors, numbers: tuple, constants: tuple, options: dict) -> None:
        if not self.is_compiled:
            self.kernel[grid](*tensors, *numbers, *constants, **options)
            return
        addresses = [tensor.data_ptr() for tensor in tensors]
        key = (
            tuple([(tensor.dtype, tensor.device) for tensor in tensors]),
            tuple([address % 16 == 0 for address in addresses]),
            self.seen(numbers),
            tuple([numbers[place] >= LONG for place in self.unseen]),
            constants,
            tuple(options.values()),
        )
        compiled, others = self.kept.get(key, (None, ()))
        if compiled is None:
            self._keep(key, self.kernel[grid](*tensors, *numbers, *constants, **options), constants, options)
        else:
            compiled[(*grid, 1, 1)[:3]](*addresses, *numbers, *constants, *others)

    def _keep(self, key: tuple, compiled, constants: tuple, options: dict) -> None:
        if len(self.kept) >= MOST_KEPT:
            self.kept.clear()
        # Gluon's kernels have an option among their parameters.
        params = self.kernel.params[self.count + len(constants) :]
        self.kept[key] = compiled, tuple(options.get(param.name, param.default) for param in params)


@cache
def _launcher(built: ModuleType, name: str, tensors: int, numbers: int) -> Launcher:
    return Launcher(getattr(built, name), tensors, numbers)
