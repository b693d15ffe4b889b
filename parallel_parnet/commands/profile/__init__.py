"""Nsight, and what traces tell."""
