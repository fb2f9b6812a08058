"""Benchmarks: `refreekv bench`."""
