"""Where the trials of a study are kept: a journal file or a database."""
