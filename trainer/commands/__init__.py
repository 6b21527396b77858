"""The commands of `cli.py`, a module for each group of them."""
