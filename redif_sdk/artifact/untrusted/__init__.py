"""Bounded readers of bytes that may come from anybody. Nothing else in the project reads such bytes first."""
