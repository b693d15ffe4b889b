"""Latency against depth: the experiment."""
