"""What a run directory shows: learning curves so far."""
