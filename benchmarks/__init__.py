"""Measurements that are no command of ``wanx``: on a GPU, and of exports at full size.

Start with ``gpu/__main__.py``. ``measurements/`` holds what docs/performance.md shows.
"""
