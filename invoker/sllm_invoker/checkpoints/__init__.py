"""Checkpoints on this node: the object format, ingest into it, and the directory that keeps objects."""
