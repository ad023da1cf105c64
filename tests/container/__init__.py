"""The container image and the compose fleet, built and run with Podman."""
