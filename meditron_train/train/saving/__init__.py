"""Checkpoints of a run: to the shared disk, to the node, in a forked process."""
