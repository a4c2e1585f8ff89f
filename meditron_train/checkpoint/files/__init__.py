"""Bytes of single files: where tensors lie in them, and how they are read and written."""
