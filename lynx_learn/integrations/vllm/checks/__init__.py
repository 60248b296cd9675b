"""Whether skipping can act in an engine, read off its configuration before any weight is."""
