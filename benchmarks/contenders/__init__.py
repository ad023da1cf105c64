"""The contenders: each a real process, configured for its best performance."""
