"""The `headroom` command: plans, runs, analyses and reports a paired comparison of two servers."""
