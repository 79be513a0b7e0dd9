"""How diffusers' networks are called and conditioned. Needs torch; `distill` and `export` both build on it."""
