"""What runs studies: their table, records and panels."""
