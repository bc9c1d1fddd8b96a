"""The program that runs on the card: control queue, data path and network ports."""

from firmware.nic import Nic

__all__ = ["Nic"]
