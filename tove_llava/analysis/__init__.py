"""Analysis of a trained model: contributions of its experts, removal of experts, and routing maps."""
