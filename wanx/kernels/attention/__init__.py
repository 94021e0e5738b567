"""Attention: the op, the backends that implement it on GPUs, and their ranking.

Start with ``op.py``, then ``backends.py``.
"""
