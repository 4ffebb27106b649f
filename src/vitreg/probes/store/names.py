"""What a feature pass can keep; read by the command line, so without PyTorch."""

from typing import Literal

StoredType = Literal["float16", "float32"]
Token = Literal["cls", "registers", "patches", "mean", "pooled"]
