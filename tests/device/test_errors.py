"""How the hardware refuses."""

import errno

import pytest

from device.errors import DeviceError


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.ENOENT, errno.ENOTTY])
def test_a_refusal_stays_one_whatever_its_number(number: int) -> None:
    refusal = DeviceError(number, "why")
    assert type(refusal) is DeviceError
    assert isinstance(refusal, OSError)
    assert (refusal.errno, refusal.strerror) == (number, "why")
