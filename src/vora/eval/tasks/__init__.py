"""Tasks, a file each: requests, what is right, and what is counted."""
