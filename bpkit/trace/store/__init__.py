"""A trace on disk: its manifest, its parquet tables, and how they are written and read."""
