"""Distances between tensors and videos, and the gates that they must pass.

Reads bundles through ``runtime``; PyTorch is not needed. Start with ``gates.py``.
"""
