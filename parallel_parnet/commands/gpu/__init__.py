"""Proofs, times and tables of kernels on the GPU at hand."""
