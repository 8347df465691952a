"""The planner: memory, traffic and time of a training run, before anything is rented.

Pure arithmetic on the sizes of a model, a number of devices and the figures of a kind of hardware. Only
:mod:`lightning_lss.planner.measure`, which checks the predictions, runs a model.
"""

from lightning_lss.planner.choices import Choice, Plan, longest_sequence, plan
from lightning_lss.planner.hardware import Hardware, Link, load_hardware
from lightning_lss.planner.memory import Memory, rank_memory
from lightning_lss.planner.report import draw_plan, print_plan, write_csv
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
    "draw_plan",
    "load_hardware",
    "longest_sequence",
    "plan",
    "print_plan",
    "rank_memory",
    "step_time",
    "step_traffic",
    "write_csv",
]
