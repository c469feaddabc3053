"""Llama's decoder layer as one operation with a backward pass of its own."""
