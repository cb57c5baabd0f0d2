"""Keep the KV cache of any PyTorch transformer compressed: `torch.compile(model, backend="turboquant")`."""

import pathlib

_HERE = pathlib.Path(__file__).parent
if not (_HERE / "kernels").is_dir():
    # A source tree holds `passes` and `kernels` beside the package, where an installed one holds them inside.
    __path__.append(str(_HERE.parent))

from tqcompile.backend import turboquant  # noqa: E402
from tqcompile.cache import CompressedKV  # noqa: E402
from tqcompile.report import report  # noqa: E402

__all__ = ["CompressedKV", "report", "turboquant"]
