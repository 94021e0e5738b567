"""ONNX graphs traced without weights, and pointed at weight files afterwards.

Start with ``trace.py``.
"""
