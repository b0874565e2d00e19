"""Implementation of the command line, which `__main__` parses."""
