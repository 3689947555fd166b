"""Tables of training runs; grids of runs, computed by one command."""
