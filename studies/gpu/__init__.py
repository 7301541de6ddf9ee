"""What a GPU is asked on the day that there is one; see `python -m studies.gpu --help`."""
