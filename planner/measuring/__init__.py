"""One config run in a process of its own, and records of it.

`measure` asks for a run and reads its end, `process` starts and waits for the process, `server` does many at
the price of one start; what the process does is `child`, by a `call`. `dry` is for cards that are not there.
"""
