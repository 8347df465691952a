"""Measurements of ``lightning_lss`` beside what a user would pick instead; see README.md in this folder."""
