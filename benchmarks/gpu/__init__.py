"""Measures kernels, layers and denoising steps on a GPU: ``python -m benchmarks.gpu``."""
