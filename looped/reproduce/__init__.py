"""Published tables with figures of one's own beside them: `looped reproduce` trains, measures and tables what a suite
says, a YAML file a table."""
