"""Products in compiled code."""
