"""Progress bars, tables and summaries for the terminal.

Start with ``generation.py``.
"""
