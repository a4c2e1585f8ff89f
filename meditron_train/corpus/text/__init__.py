"""From the formats of publishers to the plain text that a model reads."""
