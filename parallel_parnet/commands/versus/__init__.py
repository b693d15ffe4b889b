"""Is ParNet really faster than ResNet, here? One engine for both, in numbers, words and a picture."""
