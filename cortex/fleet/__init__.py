"""What cortex knows about its neurons: the state, immutable snapshots of it, and the pollers and clients that keep it
current. `cortex.control`, `cortex.api` and `cortex.metrics` read it; `cortex.placement` and the simulator take
snapshots."""
