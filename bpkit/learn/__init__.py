"""Policies with weights: what they are, their folders, and how they are trained."""
