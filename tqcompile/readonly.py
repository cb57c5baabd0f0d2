"""What a program gets for a view that the planes of a compressed cache cannot give."""

from collections.abc import Callable

import torch


class ReadOnly(torch.Tensor):
    """A decoded copy in the place of a view, of the moment it was taken: read like any tensor.

    A write raises, because the cache would not see it.

    Views of it are read-only too, and whatever is computed from it is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    dense: torch.Tensor

    @staticmethod
    def __new__(cls, dense: torch.Tensor) -> "ReadOnly":
        self = torch.Tensor._make_subclass(cls, dense)
        self.dense = dense
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from tqcompile import dispatch

        return in_parts(dispatch.run, func, args, kwargs or {})

    def _is_view(self) -> bool:
        # Dynamo would rebuild it out of the compressed cache that it was taken from.
        return False

    def __tensor_flatten__(self):
        return ["dense"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return inner["dense"]

    def __repr__(self, *, tensor_contents=None) -> str:
        return repr(self.dense)

    def __deepcopy__(self, memo) -> torch.Tensor:
        return self.dense.clone()

    def __reduce_ex__(self, protocol):
        return self.dense.clone().__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False):
        """Read-only as well."""
        array = self.dense.numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> list:
        return self.dense.tolist()

    def __array__(self, dtype=None, copy=None):
        return self.numpy().astype(dtype) if dtype else self.numpy()


def in_parts(run: Callable, func, args: tuple, kwargs: dict):
    """`run(func, args, kwargs)`, or the operators that `func` is made of, one by one: in inference mode PyTorch leaves
    it whole, and no table of single operators would know it.
    """
    made = func.decompose(*args, **kwargs) if torch.is_inference_mode_enabled() else NotImplemented
    return run(func, args, kwargs) if made is NotImplemented else made
