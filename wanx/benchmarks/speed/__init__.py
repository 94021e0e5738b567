"""Speed and memory of bundles: ``wanx bench``.

Start with ``bench.py``; ``suite.py`` runs the trials, ``roofline/`` holds them against the
machine's limits, ``pages/`` shows them.
"""
