"""What is measured: each contender as a real process, configured to do its best."""
