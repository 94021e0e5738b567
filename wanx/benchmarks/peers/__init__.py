"""Other implementations, on the weights of a bundle."""
