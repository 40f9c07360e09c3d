"""Blocks that more than one file of this room needs."""
