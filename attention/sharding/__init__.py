"""Attention whose sequence is shared by the ranks of a process group."""
