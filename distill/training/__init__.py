"""The training loop and what it stands on: the pool of pairs, checkpoints, devices, processes."""
