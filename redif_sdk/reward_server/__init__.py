"""A user's own scorer as a reward over HTTP: what request and answer are (`protocol`), and a ready server (`app`)."""
