"""The judge: accuracy and speed of bundles."""
