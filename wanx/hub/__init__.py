"""Repositories of the Hugging Face hub: their names, files, headers and downloads.

Downloads are those of ``huggingface_hub``, into its cache; the extra ``hub`` installs it. Begin
with :mod:`wanx.hub.reference`. Imports ``files`` and what is below it.
"""
