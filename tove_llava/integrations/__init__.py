"""The tower in other people's code; one package a host."""
