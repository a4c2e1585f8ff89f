"""A small invented medical world, for the demo: facts, texts that state them, and questions about them."""
