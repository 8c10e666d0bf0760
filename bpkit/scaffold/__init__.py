"""Makes the distribution of a new policy: `bpkit new`. The templates, real files, are in `templates/`. No torch."""
