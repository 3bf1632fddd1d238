"""From the outputs of the exits to one loss for each exit."""
