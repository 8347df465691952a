"""The package's version, apart so that building it needs no torch."""

__version__ = "0.1.0"
