"""Facts of the Wan models, bounds on configurations from files, and the table of number formats.

Imports nothing of wanx. Start with ``models.py``.
"""
