"""A PCI network card made of Python, served over vfio-user.

What users import stands here; each name is loaded when it is first used, so that the command starts fast.
"""

from __future__ import annotations

from trionic._rooms import check_rooms

check_rooms()
