"""`/fleet` and below it: what operators see of the fleet."""
