"""Which placement is the fastest, and why."""
