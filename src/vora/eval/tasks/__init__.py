"""What is asked, what is right, and what is counted."""
