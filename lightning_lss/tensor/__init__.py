"""Tensors of a whole sequence, split over ranks: code that was written for one device computes on segments."""

from lightning_lss.tensor import (  # noqa: F401  # register their rules
    attention,
    convolution,
    functions,
    indexing,
    losses,
    multihead,
    products,
    properties,
    randomness,
    reductions,
    shapes,
)
from lightning_lss.tensor.placement import Placement
from lightning_lss.tensor.split_tensor import SplitTensor, split, split_tensor, whole

__all__ = ["Placement", "SplitTensor", "split", "split_tensor", "whole"]
