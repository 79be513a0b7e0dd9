"""A student on disk: its manifest, its folder, safe paths and atomic writes."""
