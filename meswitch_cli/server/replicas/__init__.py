"""Several servers of one family behind one address: each has the base and all experts."""
