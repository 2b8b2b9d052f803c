"""Suites of `looped reproduce`, one a published table."""
