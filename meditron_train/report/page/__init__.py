"""The report of runs as a page: what it is made of, and how that becomes HTML and Markdown."""
