"""How much memory an attention takes: plans of named buffers, and what the allocator makes of them."""
