"""Client libraries for Python, each run in its own environment by a script of tests/clients/scripts."""
