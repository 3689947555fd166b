"""Train: settings of a stage, its trainable parts, the trainer, and the run."""

import logging

# Imported by transformers' Trainer; on a CPU it warns of an optional kernel at every start of every rank.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
