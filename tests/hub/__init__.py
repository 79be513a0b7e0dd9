"""A stand-in for the Hub, and what pushing and pulling do with it, above all when it fails."""
