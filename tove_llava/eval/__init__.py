"""Evaluation: benchmarks (prompts and scorers), the runner that answers their questions, and the report."""
