"""What writes and checks the pages of the documentation."""
