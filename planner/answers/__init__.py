"""What answers hold, as JSON has them: apart from how they are found."""
