"""Hostile students, each of which must be refused: `cases.py` makes them, `harness.py` has them read."""
