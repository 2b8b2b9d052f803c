"""Reports as lists of sections, with one renderer of HTML and one of Markdown."""
