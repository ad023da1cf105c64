"""The planner in virtual time: a fleet and a trace of requests in, waiting and loads out. Nothing runs, nothing is
sent."""
