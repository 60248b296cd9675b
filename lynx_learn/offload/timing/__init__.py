"""`lynx-learn bench --offload`: ways to decode a model whose experts lie on disk, side by side."""
