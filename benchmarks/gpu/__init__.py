"""Measures kernels, layers and denoising steps on a GPU: ``python -m benchmarks.gpu``.

``__main__.py`` is the command, ``catalog.py`` lists what is measured, ``supervisor.py`` keeps the
processes that do it.
"""

import time

STARTED = time.time()  # importing PyTorch takes seconds of the minutes, too
