"""The buffers of a call, one by one: an attention a module."""
