"""What a process tree costs, read from the kernel, and on which machine."""
