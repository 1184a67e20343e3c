"""The graph: raw files to dense ids on disk (`ingest`), back into arrays (`reader`), what is known in it."""
