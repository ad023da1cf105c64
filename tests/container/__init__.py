"""The container image and the compose fleet, really built and run."""
