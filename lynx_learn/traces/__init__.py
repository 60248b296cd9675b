"""Text, running a model over it, and the format that keeps what its routers did."""
