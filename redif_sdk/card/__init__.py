"""The model card: README.md of a student's folder, rendered from its manifest."""
