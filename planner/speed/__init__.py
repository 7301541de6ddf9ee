"""How long a call takes: counted work times what a unit of it costs on a device. No torch."""
