"""What a run keeps: SAT's layout, the state to resume from, and which run is which."""
