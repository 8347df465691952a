"""Predict the memory and traffic of a training run, and estimate its time, before anything is rented.

The planner runs the user's own LightningModule on tensors without contents, as one rank of a group of stand-ins. Tables
and pictures are in :mod:`lightning_lss.planner.report`.
"""

from lightning_lss.planner.choices import Choice, Impossible, Plan, plan
from lightning_lss.planner.hardware import Hardware, Link, load_hardware
from lightning_lss.planner.memory import Memory
from lightning_lss.planner.step import Options, Scheme
from lightning_lss.planner.timing import StepTime

__all__ = [
    "Choice",
    "Hardware",
    "Impossible",
    "Link",
    "Memory",
    "Options",
    "Plan",
    "Scheme",
    "StepTime",
    "load_hardware",
    "plan",
]
