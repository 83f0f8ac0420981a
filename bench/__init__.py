"""Benchmarks that name the physical limit they are bound by and end in one JSON line."""
