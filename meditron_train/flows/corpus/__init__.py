"""What needs both the corpus and the tokenized data: building to the end, and what runs have seen of it."""
