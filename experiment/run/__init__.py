"""Runs a plan: the servers as processes, the cells one after another, and what they leave on disk."""
