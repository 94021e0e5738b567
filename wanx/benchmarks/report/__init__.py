"""Files, pages and plots that the reports of ``wanx compare`` and ``wanx bench`` share.

Imports nothing of the two. Start with ``html.py``.
"""
