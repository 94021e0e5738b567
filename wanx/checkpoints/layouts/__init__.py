"""Layouts: where a checkpoint keeps its parts. Start with ``base.py``."""
