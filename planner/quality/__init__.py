"""How much of dense attention a config still is: captured mass under a profile, and reach. No torch."""
