"""Models whose experts do not fit in fast memory: experts are read from the checkpoint when they run."""
