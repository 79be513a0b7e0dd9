"""Teachers and students that come with the package, as data."""
