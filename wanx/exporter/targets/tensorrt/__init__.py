"""TensorRT and TensorRT-RTX: one engine for each kind of segment, built in a worker process.

Start with ``target.py``.
"""
