"""How long it takes, from numbers: costs, schedules, the search for the fastest, and its words."""
