"""vfio-user without I/O: messages, limits, and the engine that both ends share."""

from protocol.capabilities import Capabilities as Capabilities
from protocol.commands import Command as Command
from protocol.commands import Role as Role
from protocol.commands import command_name as command_name
from protocol.connection import Connection as Connection
from protocol.errors import LocalProtocolError as LocalProtocolError
from protocol.errors import ProtocolError as ProtocolError
from protocol.errors import RemoteProtocolError as RemoteProtocolError
from protocol.events import BadReply as BadReply
from protocol.events import Broken as Broken
from protocol.events import ErrorReply as ErrorReply
from protocol.events import Event as Event
from protocol.events import Negotiated as Negotiated
from protocol.events import Refused as Refused
from protocol.events import Reply as Reply
from protocol.events import Request as Request
from protocol.events import Stray as Stray
from protocol.limits import Limits as Limits
from protocol.quirks import Overrides as Overrides
from protocol.quirks import Quirk as Quirk
