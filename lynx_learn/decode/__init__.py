"""Deciding at decode, for real and simulated, and timing it."""
