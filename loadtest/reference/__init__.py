"""A streaming server that keeps an exact schedule and stamps its own sends."""
