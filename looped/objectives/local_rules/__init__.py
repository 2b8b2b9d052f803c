"""Local learning rules that classify images, for comparison: the three of NoProp (`noprop`), and Forward-Forward."""
