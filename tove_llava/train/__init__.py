"""Training: a stage's settings, what it trains, the trainer, and the run that puts them together."""

import logging

# It comes in with transformers' Trainer and, on a CPU, complains of an optional kernel at every start of every rank.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
