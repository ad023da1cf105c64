"""From a client's request to an engine and back."""
