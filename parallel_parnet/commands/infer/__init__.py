"""Classify pictures, and tell the latency."""
