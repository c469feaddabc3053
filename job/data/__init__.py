"""Rows to tokens: formats, chat templates, which tokens are learned, packing."""
