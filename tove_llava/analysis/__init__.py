"""What the experts of a trained model are worth: contributions, taking experts out, routing made visible."""
