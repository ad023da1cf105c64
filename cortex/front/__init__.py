"""Where clients arrive: connections, requests read from them, draining."""
