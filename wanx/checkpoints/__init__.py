"""Checkpoints of Wan2.1: layout, network sizes, tensor names, and readers of tensors.

Imports neither PyTorch nor the networks. Start with ``checkpoint.py``.
"""
