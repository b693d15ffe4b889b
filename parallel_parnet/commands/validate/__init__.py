"""The accuracy of a checkpoint on labelled pictures."""
