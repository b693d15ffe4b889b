"""Int8 and fp8 after training: which numbers of 8 bits stand for weights and features, found from pictures."""
