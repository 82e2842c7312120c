"""Runs that are kept: listed, held against each other, and against limits."""
