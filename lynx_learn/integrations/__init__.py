"""What connects this package to serving engines."""
