"""What all ranks agree on, and what their states become."""
