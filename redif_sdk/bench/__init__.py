"""Timing: contenders in interleaved rounds, cold starts, operations, charts."""
