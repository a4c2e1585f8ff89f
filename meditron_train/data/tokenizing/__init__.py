"""From text to indexed token files."""
