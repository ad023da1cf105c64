"""A worker's request path: find the model's engine, choose a replica, relay the answer, fail over. `cortex.app` builds
it, and it reaches the control through the `Control` protocol only."""
