"""How parameters lie on the ranks, and how their gradients are averaged."""
