"""Several processes on one port: each serves clients, one control process decides for all."""
