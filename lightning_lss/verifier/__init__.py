"""Prove a module on CPU processes, apart from any run: gradients, modules, and which outputs a token reaches."""

from lightning_lss.verifier.processes import verify

__all__ = ["verify"]
