"""The sizes of a call, from its shape alone: what the executor asks for and plans count. Imports no torch."""
