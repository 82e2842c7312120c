"""From what a run left to its figures: pure, from the records alone."""
