"""Hostile students, each of which must be refused: `cases/` makes them, `harness.py` has them read."""
