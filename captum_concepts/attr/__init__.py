"""The attribution methods, one per module."""
