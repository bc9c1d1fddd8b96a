"""What kinds of containers there are, and how they differ."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from errno import EINVAL, ENOENT


class Mode(Enum):
    """TYPE1 and TYPE1V2 are VFIO's (drivers/vfio/vfio_iommu_type1.c), IOMMUFD is what follows them
    (drivers/iommu/iommufd).
    """

    TYPE1 = "type1"
    TYPE1V2 = "type1v2"
    IOMMUFD = "iommufd"

    @property
    def rules(self) -> Rules:
        """What holds in it."""
        return _RULES[self]


@dataclass(frozen=True, slots=True)
class Rules:
    """Where the modes differ, apart from the order in which they check."""

    pins: bool = True
    """Whether pages can be pinned: the first version has no such thing."""
    takes_mappings: bool = True
    """Whether the mapping of a BAR can be mapped by its address; IOMMUFD pins pages, and it has none."""
    restores: bool = True
    """Whether what lies in a BAR comes back when its device answers again. IOMMUFD forgets it for good, until
    it is unmapped and mapped again.
    """
    one_range: bool = False
    """Whether an export must be of one range (drivers/iommu/iommufd/pages.c)."""
    limits_entries: bool = True
    """Whether the number of mappings is limited, apart from what they take of locked memory."""
    not_mapped: int = EINVAL
    """Errno of pins where nothing is mapped."""


_RULES = {
    Mode.TYPE1: Rules(pins=False),
    Mode.TYPE1V2: Rules(),
    Mode.IOMMUFD: Rules(
        takes_mappings=False, restores=False, one_range=True, limits_entries=False, not_mapped=ENOENT
    ),
}
