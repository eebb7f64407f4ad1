"""Seedpod: open video models from mounted checkpoints."""

__version__ = "0.1.0"
