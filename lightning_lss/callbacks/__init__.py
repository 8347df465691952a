"""Callbacks that show more of a run than its loss: throughput, gradient norm, memory, the split of the sequence."""

from lightning_lss.callbacks.gradient_norm import GradientNormMonitor
from lightning_lss.callbacks.memory import PeakMemoryMonitor
from lightning_lss.callbacks.predictions import PredictionWriter
from lightning_lss.callbacks.pretrained import PretrainedWriter
from lightning_lss.callbacks.run_layout import RunLayout
from lightning_lss.callbacks.throughput import LSSThroughputMonitor

__all__ = [
    "GradientNormMonitor",
    "LSSThroughputMonitor",
    "PeakMemoryMonitor",
    "PredictionWriter",
    "PretrainedWriter",
    "RunLayout",
]
