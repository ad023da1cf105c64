"""What the commands of cortex and neuron share: reading the command line, printing tables, and ending with the right
exit code and message."""
