"""Clients that `benchmarks.client` drives: how to call each, and what it says that it saw."""
