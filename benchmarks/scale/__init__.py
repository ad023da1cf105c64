"""Parts of the cold-load and fleet-size benchmarks: services as child processes, and a simulated fleet."""
