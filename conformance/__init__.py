"""What the vfio-user specification demands, as checks of anyone's server and anyone's client."""

from conformance.checks import Binds as Binds
from conformance.checks import Check as Check
from conformance.checks import Outcome as Outcome
from conformance.checks import Result as Result
from conformance.checks import Severity as Severity
from conformance.checks import select as select
from conformance.hosts import Host as Host
from conformance.hosts import Listening as Listening
from conformance.hosts import Started as Started
from conformance.running import run_checks as run_checks
from conformance.table import SERVER_CHECKS as SERVER_CHECKS
