"""What Linux tells of files and processes: atomic replacement, changes of files, /proc."""
