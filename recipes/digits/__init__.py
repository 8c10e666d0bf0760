"""Jacobi drafts on images: a model of handwritten digits, trained here, and passes of the target for each image."""
