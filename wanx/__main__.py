"""Lets ``python -m wanx`` stand for ``wanx``."""

from wanx.cli import main

if __name__ == "__main__":
    main()
