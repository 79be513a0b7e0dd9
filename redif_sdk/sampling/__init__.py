"""Step tables, the loop that runs them, and the noise they start from: numpy alone."""
