"""The last 24 hours of the fleet: what it is made of, who keeps it, and its file."""
