"""What a run shows of itself while it goes on: statistics, the page, Prometheus's metrics."""
