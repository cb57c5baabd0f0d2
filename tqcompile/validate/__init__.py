"""What a compressed cache costs on one's own model and text: `validate(model, tokenizer, text, codecs)`."""

from tqcompile.validate.result import Result
from tqcompile.validate.run import validate
from tqcompile.validate.settings import Settings
from tqcompile.validate.verdict import Threshold

__all__ = ["Result", "Settings", "Threshold", "validate"]
