"""Plain dicts in, pages out: tables, figures, cards, progress."""
