"""What Dynamo guards of a cache is one object for all that are alike, however it was come by."""

import copy
import pickle

import pytest
import torch
from test_cache import made

from tqcompile.guarded import guarded


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda what: pickle.loads(pickle.dumps(what))])
def test_a_copy_is_the_same_object(again):
    what = guarded("turboquant:4", torch.float16, torch.device("cpu"), None)
    assert again(what) is what


def test_caches_that_are_alike_are_guarded_alike_and_others_are_not():
    cache, other = made(), made()
    assert cache.__tensor_flatten__()[1] is other.__tensor_flatten__()[1] is type(cache).__tensor_flatten__(cache)[1]
    assert cache.to(torch.float16).__tensor_flatten__()[1] is not cache.__tensor_flatten__()[1]
