"""Benchmarks: what the performance claims in the documentation rest on."""
