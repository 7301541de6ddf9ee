"""The way from a question to the best candidate: the space, the grid, Optuna, the reasons. No torch."""
