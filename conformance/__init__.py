"""What the vfio-user specification demands, as checks of anyone's server and anyone's client."""

from conformance.checks import Binds as Binds
from conformance.checks import Check as Check
from conformance.checks import GoneError as GoneError
from conformance.checks import Outcome as Outcome
from conformance.checks import Result as Result
from conformance.checks import Severity as Severity
from conformance.checks import Silent as Silent
from conformance.checks import select as select
from conformance.clients import CLIENT_CHECKS as CLIENT_CHECKS
from conformance.expectations import ExpectationError as ExpectationError
from conformance.expectations import Judged as Judged
from conformance.expectations import Verdict as Verdict
from conformance.expectations import judge as judge
from conformance.expectations import read_expectations as read_expectations
from conformance.hosts import Host as Host
from conformance.hosts import Listening as Listening
from conformance.hosts import Started as Started
from conformance.junit import write_junit as write_junit
from conformance.running import reach as reach
from conformance.running import run_checks as run_checks
from conformance.table import SERVER_CHECKS as SERVER_CHECKS
from conformance.watching import listening as listening
from conformance.watching import watch as watch
