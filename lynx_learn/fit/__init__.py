"""From a trace to a selector."""
