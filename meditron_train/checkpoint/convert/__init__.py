"""Conversion between formats: streamed, resumable, published by one rename."""
