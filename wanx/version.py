"""Version of wanx, which bundles, reports and videos record."""

__version__ = "0.1.0"
