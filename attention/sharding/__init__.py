"""Attention over several ranks: who holds which tokens, what is exchanged, and the module that does it."""
