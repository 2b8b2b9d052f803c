"""Reports as lists of sections, with one renderer for HTML and one for Markdown."""
