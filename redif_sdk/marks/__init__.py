"""Images that say that they were generated, and by what."""
