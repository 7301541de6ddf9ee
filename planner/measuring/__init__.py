"""One config run in a process of its own, and records of it."""
