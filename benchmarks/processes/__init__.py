"""2 and 4 processes against 1: ranking, frozen sets, losses."""
