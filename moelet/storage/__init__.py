"""What is kept on disk, and how it is read again: whole, checked, by one process at a time."""
