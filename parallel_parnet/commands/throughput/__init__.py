"""What a batch costs: pictures a second and latency as it grows, ours beside peers."""
