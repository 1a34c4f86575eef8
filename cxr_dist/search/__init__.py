"""A search over settings: its space, what it tries next, what a trial is, and what is kept of it. No Ray here."""
