"""What the tokenizer of a model directory means: one reading, for checkpoints and for data."""
