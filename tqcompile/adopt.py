"""A dense cache becomes a compressed one where it stands: the same Python object, for all who hold it."""

import math

import torch

from tqcompile.cache import CompressedKV
from tqcompile.centre import Centring
from tqcompile.codec import Codec


def refusal(tensor: torch.Tensor) -> str | None:
    """Why this dense tensor cannot be turned into a compressed cache where it stands, or None."""
    if type(tensor) is not torch.Tensor:
        return f"it is a {type(tensor).__name__}, not a plain tensor"
    if tensor.requires_grad:
        return "it requires grad"
    if tensor._is_view():
        return "it is a view of another tensor"
    if torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2:
        return "other tensors share its memory"
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return "it covers a part of its memory only"
    if not math.prod(tensor.shape):
        return "it is empty"
    return None


def adopt(tensor: torch.Tensor, codec: Codec, centring: Centring | None = None) -> str | None:
    """Turn a dense cache into a `CompressedKV`, the same Python object: every holder sees it, its memory is freed.

    Returns why it could not be done, and leaves the tensor as it was; None when it was.
    """
    reason = refusal(tensor)
    if reason is not None:
        return reason
    kept = dict(tensor.__dict__)
    shell = CompressedKV.encode(tensor, codec, centring)
    try:
        torch._C._swap_tensor_impl(tensor, shell)
    except RuntimeError as error:
        return f"PyTorch holds another reference to it ({str(error).splitlines()[0]})"
    state = dict(shell.__dict__)
    tensor.__class__, shell.__class__ = CompressedKV, torch.Tensor
    tensor.__dict__.update(state)
    shell.__dict__.clear()
    tensor.__dict__.update({name: value for name, value in kept.items() if name.startswith("_dynamo")})
    return None
