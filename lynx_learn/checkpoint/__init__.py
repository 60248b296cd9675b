"""A model's files: what lies where in them, and its MoE blocks one at a time."""
