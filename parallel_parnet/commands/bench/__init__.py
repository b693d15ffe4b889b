"""Executors and peers side by side: the benchmark."""
