"""CUDA, through ONNX Runtime's own provider; not yet run on a GPU.

Start with ``graph.py``.
"""
