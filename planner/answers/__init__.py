"""Answers as JSON holds them, apart from the search for them."""
