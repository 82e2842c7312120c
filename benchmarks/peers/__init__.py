"""Clients that `benchmarks.client` drives: how to call each, and what it says held against the reference server."""

#: Seconds over which the requests of a measurement are spread evenly.
ARRIVAL_SECONDS = 2.0
#: Requests sent before those, at the same rate, and left out: what a client does for the first time takes it longer.
WARM_UP = 8
