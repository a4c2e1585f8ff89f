"""Text: where training documents come from and what they say. Never token ids."""
