"""Checkpoint folders of every format: reading, writing, converting, exporting and the hub."""
