"""Search for the fastest launch configurations on this GPU: ``python -m benchmarks.tuning.tune``.

Start with ``tune.py``. The table that it fills is ``wanx/kernels/tuned.json``.
"""
