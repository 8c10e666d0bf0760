"""The checks of `bpkit.testing.check_policy`, one a file; `check` lists them."""
