"""The two sides of a triple that can be asked for. Needs nothing: kernels also run where no graph is read."""

from typing import Literal

__all__ = ["Side"]

#: the side of a triple that is replaced, or predicted
Side = Literal["head", "tail"]
