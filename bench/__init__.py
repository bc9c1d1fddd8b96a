"""Measurements: what the project claims about speed, run beside what it is compared with."""
