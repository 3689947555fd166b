"""Training: a stage's settings, what it trains, the trainer, and the run that puts them together."""
