"""Exact attention along a split sequence."""
