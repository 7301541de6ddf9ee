"""Programs of users, run on cards that are not there."""
