"""Benchmarks the ops against the same losses written the usual way. `python -m bench.report` prints the results."""
