"""Session on engines of TensorRT and TensorRT-RTX.

Start with ``session.py``, then ``engine.py``.
"""
