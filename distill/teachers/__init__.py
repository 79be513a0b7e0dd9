"""The shipped teachers: one diffusers folder each, with a bank of its outputs. Data only."""
