"""From indexed token files to packed micro-batches."""
