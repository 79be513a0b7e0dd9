"""Step tables, the loop that runs them, and the noise that they start from. Needs numpy only."""
