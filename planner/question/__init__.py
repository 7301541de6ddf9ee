"""Questions: values and their defaults. Imports nothing above."""
