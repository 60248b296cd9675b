"""What a Mixture-of-Experts model of transformers is: where its blocks are, how they route, how they are hooked and loaded."""
