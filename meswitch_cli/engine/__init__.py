"""Generation by the base and its experts."""
