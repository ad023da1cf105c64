"""What cortex knows about its neurons: the state, immutable snapshots of it, and the pollers and clients that keep it
current. `cortex.control` and `cortex.api` read it; decisions take a snapshot."""
