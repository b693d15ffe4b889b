"""Training on a folder of pictures."""
