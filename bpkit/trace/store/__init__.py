"""A trace on disk: its manifest, its parquet tables, and the lock of the run that writes them."""
