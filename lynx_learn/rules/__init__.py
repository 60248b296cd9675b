"""Published rules, and what they need to know of the experts."""
