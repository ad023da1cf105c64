"""What the client libraries are made to do. Runs in the environments of tests/environment/clients.py."""
