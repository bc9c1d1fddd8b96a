"""How the hardware refuses."""


class DeviceError(OSError):
    """A refused access: `errno` is what the client is told, the message is for the log."""
