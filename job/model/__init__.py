"""The network: loading, quantisation, adapters, merging."""
