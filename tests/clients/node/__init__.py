"""Client libraries for Node.js, each run by a script of tests/clients/scripts."""
