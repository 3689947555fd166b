"""Answering: one loaded model, its prompts and pictures, streaming answers, and the browser demo."""
