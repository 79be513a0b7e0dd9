"""Students as a service: the HTTP application, micro-batching, and a Ray Serve application. Imported when asked for."""
