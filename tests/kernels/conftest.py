"""Where the kernels of this folder's tests run: on a GPU, or on CPU tensors through Triton's interpreter."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("kernels", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("kernels")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """`cpu` is the interpreter; `cuda` runs under `-m gpu` alone."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
