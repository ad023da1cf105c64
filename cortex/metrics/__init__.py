"""Counters of the request path, their sums over all workers, and the Prometheus exporter. The proxy and the control
count; `/metrics` and the control's demand read."""
