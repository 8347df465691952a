"""The Lightning strategy that owns the process groups and the synchronization of gradients."""
