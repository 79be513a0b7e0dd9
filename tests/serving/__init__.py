"""The HTTP server: its batches, its answers, and the clients that people use."""
