"""Evaluation: benchmarks, the runner that answers them, and reports."""
