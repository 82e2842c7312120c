"""Samples the memory of GPUs and of server processes, and serves the samples over HTTP.

Knows nothing of servers but their names: a process belongs to server NAME when its environment holds
HEADROOM_SERVER=NAME. One that names another HEADROOM_STACK than the monitor, as comparisons set it, is left out.
"""
