"""How diffusers' networks are called and conditioned. Needs torch; `distill` and `export` build on it."""
