"""What is measured on, and what the papers printed."""
