"""What the control and its workers share about where a request goes: the `Control` contract, replicas, routes and
failures, and the choice among replicas by outstanding work, measured speed and prefix affinity. Pure."""
