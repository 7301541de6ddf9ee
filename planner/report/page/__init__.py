"""A page of HTML from an answer."""
