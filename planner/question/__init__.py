"""What is asked: values and their defaults. Imports nothing above."""
