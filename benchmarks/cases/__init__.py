"""The measurements of each contender, one kind of work a module."""
