"""Views in inference mode, where PyTorch hands a subclass whole what it takes apart elsewhere."""

import pytest
import torch
from test_dispatch import made

from tqcompile import CompressedKV
from tqcompile.readonly import ReadOnly

VIEWS = {
    "narrow": (lambda x: x[0].narrow(1, 1, 4), True),
    "chunk": (lambda x: x.chunk(3, 1)[1], True),
    "flatten": (lambda x: x.flatten(0, 1), True),
    "to its own dtype": (lambda x: x.to(torch.float32), True),
    "a part of a token": (lambda x: x[..., :2], False),
    "narrow of a part": (lambda x: x[..., :4].narrow(-1, 1, 2), False),
    "all numbers": (lambda x: x.view(-1), False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_inference_mode_gives_the_views_that_no_grad_gives(name):
    view, whole = VIEWS[name]
    cache = made()
    with torch.inference_mode():
        shown = view(cache)
        assert isinstance(shown, CompressedKV if whole else ReadOnly)
        torch.testing.assert_close(shown.clone() + 0, view(cache.decode()), rtol=0, atol=0)
        if whole:
            shown.zero_()
            assert not view(cache.decode()).any()
