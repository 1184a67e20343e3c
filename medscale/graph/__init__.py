"""The graph: raw files to dense ids on disk (`ingest`), back into arrays (`reader`), and what is known in it."""
