"""CUDA device: streams, events, memory, weights on the GPU and weights streamed to it.

Start with ``cuda.py``, then ``weights.py``.
"""
