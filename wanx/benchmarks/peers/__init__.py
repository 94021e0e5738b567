"""Other implementations of Wan2.1, run on the weights of a bundle.

The only part of ``wanx.benchmarks`` that imports PyTorch. Start with ``diffusers.py``.
"""
