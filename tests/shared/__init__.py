"""What both services are built on."""
