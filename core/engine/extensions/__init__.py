"""Parts that stand on the core and that the core does not know: each folder can be deleted, and the rest works."""
