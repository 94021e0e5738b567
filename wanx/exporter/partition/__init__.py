"""Partition of components into segments that take their weights as inputs.

Start with ``partition.py``; ``segments.py`` defines a segment and the schedule that runs them.
"""
