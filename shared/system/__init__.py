"""Files, processes and connections as the system has them: atomic replacement, changes of files, /proc, children that
are kept running, tunnels through two connections."""
