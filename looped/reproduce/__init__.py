"""`looped reproduce`: train and measure what a published table reports, and print both side by side. Each table is a
suite, one YAML file."""
