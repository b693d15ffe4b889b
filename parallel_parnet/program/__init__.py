"""What runs, as data: the folded program, its contract, and where its operations run."""
