"""This runtime inside other programs."""
