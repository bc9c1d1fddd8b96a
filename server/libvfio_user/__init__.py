"""The other engine: the same cards, served by Nutanix's libvfio-user instead of by `server.session`."""

from server.libvfio_user._abi import Generation
from server.libvfio_user.library import Library, LibraryError
from server.libvfio_user.limits import Limit, limits_of
from server.libvfio_user.serving import serve

__all__ = ["Generation", "Library", "LibraryError", "Limit", "limits_of", "serve"]
