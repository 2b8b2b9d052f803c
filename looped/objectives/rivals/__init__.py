"""Local rules that classify images, for comparison: NoProp's three (`noprop`), and Forward-Forward."""
