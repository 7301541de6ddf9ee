"""What commands show: tables, plain text, data, pictures, programs. No torch."""
