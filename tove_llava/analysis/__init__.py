"""Analysis of a trained model: contributions and removal of experts, routing maps."""
