"""What other packages and papers do, behind one call."""
