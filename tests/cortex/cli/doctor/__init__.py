"""`cortex doctor`: real deployments, with one real fault each."""
