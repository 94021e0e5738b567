"""Judgement of bundles: ``accuracy/`` for ``wanx compare``, ``speed/`` for ``wanx bench``.

Imports everything below it but the exporter and PyTorch, which only ``peers/`` needs. ``report/``
holds what both kinds of pages share. Start with ``accuracy/compare.py`` or ``speed/bench.py``.
"""
