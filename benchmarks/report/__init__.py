"""Records into the page, its plots and the README's table."""
