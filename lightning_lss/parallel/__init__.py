"""How parameters are distributed over the ranks, and how their gradients are averaged."""
