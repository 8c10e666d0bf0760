"""Many rows by wall clock: the same prompts at several batch sizes."""
