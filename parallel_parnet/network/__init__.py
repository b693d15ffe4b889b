"""What is trained: sizes, blocks, the network, its checkpoints."""
