"""OpenVINO, through its plug-in for ONNX Runtime.

Start with ``graph.py``.
"""
