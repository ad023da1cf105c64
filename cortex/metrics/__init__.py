"""Counters of the request path, summed over workers, and their Prometheus exporter. The proxy and the control write
them; `/metrics` and the scheduler read them."""
