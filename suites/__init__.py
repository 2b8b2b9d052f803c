"""Suites of `looped reproduce`: one YAML file per published table."""
