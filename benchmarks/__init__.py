"""Benchmarks of cmlm_fast against what users would run instead; `make bench` from the repository root."""
