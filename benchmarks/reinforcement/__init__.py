"""Does reinforcement by a reward that sees the prompt pay? The experiment, its judge and its controls."""
