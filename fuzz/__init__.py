"""Peers and drivers that lie, made of random bytes: what the card and the engine must outlive.

Each target is a function of bytes. atheris finds bytes that reach new code; where there is no atheris, a
plain generator does without; hypothesis gives the same bytes in the tests. `python -m fuzz` runs them.
"""
