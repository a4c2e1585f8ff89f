"""From declared sources to one clean, deduplicated, decontaminated file per source and split."""
