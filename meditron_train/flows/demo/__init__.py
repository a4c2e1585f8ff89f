"""The Meditron experiment in miniature."""
