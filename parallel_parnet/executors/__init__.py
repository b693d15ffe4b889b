"""Executors run a program under a placement. Import one by name; the engine chooses."""
