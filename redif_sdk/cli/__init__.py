"""The command `redif`: one file a command."""
