"""The model: loading, quantization, adapters, merging, and the fused layers."""
