"""Victims, repairs and tables; run from a clone with ``python -m benchmarks``."""
