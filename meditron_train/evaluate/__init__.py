"""What a model knows and says: likelihood, multiple choice, perplexity, generated text."""
