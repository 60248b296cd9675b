"""What is learned: features, scorers, surrogates, and the files that hold them."""
