"""A selector at work in a worker's model: what each row of a step asks for, and what each layer makes of it."""
