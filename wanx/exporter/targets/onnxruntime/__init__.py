"""ONNX Runtime: variants of the portable graphs that its kernels run faster, and what it ran.

Start with ``graph.py``.
"""
