"""Progress bars, tables and summaries for the terminal.

Start with ``generation.py``; ``streams.py`` makes them survive any stdout and stderr.
"""
