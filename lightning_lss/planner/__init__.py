"""The planner: memory, traffic and time of a training run, before anything is rented.

Pure arithmetic on the sizes of a model, a number of devices and the figures of a kind of hardware. Only
:mod:`lightning_lss.planner.measure`, which checks the predictions, runs a model. Tables and pictures are in
:mod:`lightning_lss.planner.report` and :mod:`lightning_lss.planner.scaling`.
"""

from lightning_lss.planner.choices import Choice, Plan, longest_sequence, plan, usual_options
from lightning_lss.planner.hardware import Hardware, Link, load_hardware
from lightning_lss.planner.memory import Memory, rank_memory
from lightning_lss.planner.setup import Options, Setup
from lightning_lss.planner.timing import StepTime, step_time
from lightning_lss.planner.traffic import Traffic, step_traffic

__all__ = [
    "Choice",
    "Hardware",
    "Link",
    "Memory",
    "Options",
    "Plan",
    "Setup",
    "StepTime",
    "Traffic",
    "load_hardware",
    "longest_sequence",
    "plan",
    "rank_memory",
    "step_time",
    "step_traffic",
    "usual_options",
]
