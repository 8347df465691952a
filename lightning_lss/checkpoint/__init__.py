"""Checkpoints that know neither the number of ranks nor how parameters lie on them."""
