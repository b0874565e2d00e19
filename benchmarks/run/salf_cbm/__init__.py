"""SALFCBM."""
