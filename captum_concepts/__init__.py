"""Concept attribution next to Captum."""
