"""Targets: how the portable graphs become engines of ONNX Runtime, AOTInductor and TensorRT.

Start with ``registry.py``.
"""
