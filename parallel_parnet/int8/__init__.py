"""Int8 after training: which integers stand for a program's weights and features, found from pictures."""
