"""Nvidia's sequence parallelism for the same model: the baseline of the LSS paper."""
