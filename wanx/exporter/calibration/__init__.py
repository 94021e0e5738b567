"""Calibration: real denoising runs whose activations are observed, one block in memory at a time.

Start with ``calibrate.py``.
"""
