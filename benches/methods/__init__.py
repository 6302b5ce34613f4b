"""The compression methods on real data: `make methods`."""
