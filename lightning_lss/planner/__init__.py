"""The planner: memory, traffic and an estimate of the time of a training run, before anything is rented.

It runs the user's own LightningModule on tensors without contents, as one rank of a group whose others do not exist. Tables
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
