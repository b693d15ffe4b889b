"""The folded network as a file that other libraries take."""
