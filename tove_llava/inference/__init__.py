"""Answering with a loaded model: prompts, generation, sampling, batches and the engine."""
