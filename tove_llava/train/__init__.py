"""Train a stage: settings, trainable parts, trainer, and run."""

import logging

# Imported by transformers' Trainer; on a CPU it warns of an optional kernel at every start of every rank.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
