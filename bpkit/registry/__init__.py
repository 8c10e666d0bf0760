"""Plug-ins: the hooks, discovery, and from names to objects."""
