"""What is measured of each contender, one kind of work a module."""
