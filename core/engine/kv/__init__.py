"""The paged KV cache: specifications, blocks, and the manager that hands blocks to requests."""
