"""Llama's decoder layer as one operation with a backward pass of its own."""

MANY_TOKENS = 4096  # from here on some kernels load by descriptors, of which each takes the host some 40 µs to make
