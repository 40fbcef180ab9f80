"""Benchmarks of the ops against the same losses written the usual way. `python -m bench.table` prints them all."""
