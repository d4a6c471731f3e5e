"""Real clients against a live server, each in an environment of its own."""
