"""Benchmarks: each checks correctness first, then times the solve beside its rivals in one run."""
