"""Commands of ``wanx``, one a file: parse, one call into the library, display.

Start with ``run.py``; ``options.py`` holds the options that commands share.
"""
