"""The tool `vdpa` and the two parents: what they tell of the card, what they allow and what they refuse."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
import trio

from device.profiles import PROFILES
from device.virtio.features import Feature
from tests.guest import Root
from tests.guest.cards import ServedCard, serve_cards
from tests.guest.vdpa.parents import IFCVF, VP_VDPA, Parent
from tests.guest.vdpa.story import Story

PROVISIONED: Final = (
    Feature.VERSION_1
    | Feature.ACCESS_PLATFORM
    | Feature.NET_MAC
    | Feature.NET_MTU
    | Feature.NET_STATUS
    | Feature.NET_CSUM
)

UNPROTECTED: Final = PROVISIONED & ~Feature.ACCESS_PLATFORM

TOO_MANY: Final = PROVISIONED | Feature.RING_PACKED

# The card of the parent's first profile, and then those of its others.
SCRIPT: Final = """
modprobe virtio_vdpa
modprobe virtio_net
{takes}
mgmt=pci/$(basename $(card 0))
for attribute in "mac 52:54:00:00:00:99" "mtu 1400" "max_vqp 1"; do
    step "refused_${{attribute%% *}}"
    refused vdpa dev add name vdpa0 mgmtdev $mgmt $attribute
done
step too_many_features
refused vdpa dev add name vdpa0 mgmtdev $mgmt device_features {too_many:#x}
step unknown_card
refused vdpa dev add name vdpa0 mgmtdev pci/0000:ff:01.0
step no_device
vdpa -j dev show
refused vdpa dev del vdpa0
step unprotected
vdpa dev add name vdpa0 mgmtdev $mgmt device_features {unprotected:#x}
ls $(card 0)/virtio*/
tell unprotected; await_host
vdpa dev del vdpa0
step provisioned
vdpa dev add name vdpa0 mgmtdev $mgmt device_features {provisioned:#x}
tell provisioned; await_host
ethtool -k $(nic)
vdpa dev del vdpa0
n=0
for profile in {profiles}; do
    step added_$profile
    vdpa dev add name vdpa$n mgmtdev pci/$(basename $(card $n))
    tell added_$profile; await_host
    step show_$profile
    vdpa -j dev show vdpa$n
    step config_$profile
    vdpa -j dev config show vdpa$n
    step interface_$profile
    dev=$(nic $n)
    ethtool -i $dev
    cat /sys/class/net/$dev/address /sys/class/net/$dev/mtu
    step vstats_$profile
    refused vdpa dev vstats show vdpa$n qidx 0
    step set_$profile
    refused vdpa dev set name vdpa$n mac 00:11:22:33:44:55
    n=$((n + 1))
done
step end
"""

TAKE: Final = """
{take}
step management_{profile}
vdpa -j mgmtdev show $mgmt
"""

# What the drivers say of what they refuse: ifcvf_main.c and vp_vdpa.c of drivers/vdpa.
REFUSALS: Final = {
    IFCVF: [
        "The provisioned features 0x",
        "VIRTIO_F_ACCESS_PLATFORM is not negotiated",
        "failed with error -22",
    ],
    VP_VDPA: ["Try to provision features that are not supported by the device"],
}


async def _watch(parent: Parent, root: Root, story: Story, cards: list[ServedCard]) -> None:
    takes = [
        TAKE.format(take=parent.take(number), profile=profile)
        for number, profile in enumerate(parent.profiles)
    ]
    script = SCRIPT.format(
        takes="".join(takes),
        profiles=" ".join(parent.profiles),
        too_many=TOO_MANY,
        unprotected=UNPROTECTED,
        provisioned=PROVISIONED,
    )
    moments = {"unprotected": 0, "provisioned": 0} | {
        f"added_{profile}": number for number, profile in enumerate(parent.profiles)
    }
    async with story.told(script, cards, root, expected_complaints=REFUSALS[parent]) as guest:
        for moment, number in moments.items():
            await guest.expect(moment)
            story.seen[moment] = Feature(cards[number].nic.card.transport.driver_features)
            guest.say()


@pytest.fixture(scope="module")
def story(guest_root: Root, tmp_path_factory: pytest.TempPathFactory, parent: Parent) -> Story:
    """The script, run to its end in a guest with a card of each profile that the parent takes."""

    async def tell() -> Story:
        story = Story()
        profiles = [PROFILES[name] for name in parent.profiles]
        folder = tmp_path_factory.mktemp("management")
        async with serve_cards(folder, ["loopback"] * len(profiles), profiles=profiles) as cards:
            story.seen["offered"] = {
                card.nic.card.profile.name: card.nic.offered_features() for card in cards
            }
            await _watch(parent, guest_root, story, cards)
        return story

    return trio.run(tell)


def tool_names(features: int) -> set[str]:
    """Features as the tool `vdpa` names them."""
    return {str(feature.name).removeprefix("NET_") for feature in Feature if feature & features}


def printed(text: str) -> Any:
    """What the tool printed as JSON; it leaves blanks in some keys."""

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key.strip(): value for key, value in pairs}

    return json.loads(text, object_pairs_hook=plain)


def each_profile(parent: Parent, story: Story, step: str) -> list[Any]:
    """What the tool printed as JSON in this step, for each of the parent's profiles, less two levels."""
    found = []
    for profile in parent.profiles:
        (kind,) = printed(story.step(f"{step}_{profile}")).values()
        (device,) = kind.values()
        found.append(device)
    return found


def test_kernel_has_nothing_to_say_but_what_it_refuses(story: Story) -> None:
    assert story.step("end") == ""
    assert story.complaints == []


def test_the_management_device_tells_exactly_what_the_profile_offers(parent: Parent, story: Story) -> None:
    devices = each_profile(parent, story, "management")
    assert [device["supported_classes"] for device in devices] == [["net"]] * len(devices)
    assert [device["max_supported_vqs"] for device in devices] == [3] * len(devices)
    assert [set(device["dev_features"]) for device in devices] == [
        tool_names(story.seen["offered"][profile]) for profile in parent.profiles
    ]


@pytest.mark.parametrize(("attribute", "bit"), [("mac", 10), ("mtu", 13), ("max_vqp", 12)])
def test_nothing_but_features_can_be_provisioned(story: Story, attribute: str, bit: int) -> None:
    """The bits are VDPA_ATTR_DEV_NET_CFG_MACADDR and its like, of include/uapi/linux/vdpa.h."""
    said = story.step(f"refused_{attribute}")
    assert f"Some provided attributes are not supported: {1 << bit:#x}" in said
    assert "Operation not supported" in said


def test_features_that_the_card_lacks_are_refused(story: Story) -> None:
    assert "Invalid argument" in story.step("too_many_features")


def test_what_is_not_there_is_neither_added_nor_deleted(story: Story) -> None:
    assert "No such device" in story.step("unknown_card")
    assert printed(story.step("no_device").splitlines()[0]) == {"dev": {}}
    assert "device not found" in story.step("no_device")


def test_provisioned_features_are_all_that_the_driver_gets(story: Story) -> None:
    assert story.seen["provisioned"] == PROVISIONED
    said = story.step("provisioned")
    assert "tx-checksum-ip-generic: on" in said
    assert "tx-tcp-segmentation: off [fixed]" in said


def test_without_protected_memory_ifcvf_gives_no_interface(parent: Parent, story: Story) -> None:
    """It refuses the features (ifcvf_verify_min_features); vp_vdpa has no opinion."""
    agreed = {IFCVF: Feature(0), VP_VDPA: UNPROTECTED}
    assert story.seen["unprotected"] == agreed[parent]
    assert ("net" in story.step("unprotected").split()) == (parent is VP_VDPA)


def test_virtio_vdpa_takes_all_that_is_offered_but_what_it_has_no_use_for(
    parent: Parent, story: Story
) -> None:
    offered = story.seen["offered"]
    left_out = [offered[profile] & ~story.seen[f"added_{profile}"] for profile in parent.profiles]
    assert left_out == [Feature.NET_CTRL_RX_EXTRA] * len(parent.profiles)


def test_the_vdpa_device_tells_its_queues_and_its_vendor(parent: Parent, story: Story) -> None:
    """The vendor of the subsystem."""
    for profile, device in zip(parent.profiles, each_profile(parent, story, "show"), strict=True):
        assert device["type"] == "network"
        assert device["max_vqs"] == 3
        assert device["vendor_id"] == PROFILES[profile].identity.subsystem_vendor
        greatest = PROFILES[profile].queue_size
        # VP_VDPA_QUEUE_MAX: it asks no card.
        assert device["max_vq_size"] == (greatest if parent is IFCVF else 256)


def test_the_configuration_is_the_cards(parent: Parent, story: Story) -> None:
    for number, device in enumerate(each_profile(parent, story, "config")):
        assert device["mac"] == f"52:54:00:12:34:0{number}"
        assert (device["link"], device["link_announce"]) == ("up", False)
        assert device["mtu"] == 1500
        if parent is VP_VDPA:  # ifcvf_get_driver_features reads one half of them twice
            agreed = story.seen[f"added_{parent.profiles[number]}"]
            assert set(device["negotiated_features"]) == tool_names(agreed)


def test_the_interface_has_the_cards_address_and_mtu(parent: Parent, story: Story) -> None:
    for number, profile in enumerate(parent.profiles):
        said = story.step(f"interface_{profile}")
        assert "driver: virtio_net\n" in said
        assert f"bus-info: vdpa{number}\n" in said
        assert said.endswith(f"52:54:00:12:34:0{number}\n1500\n\n")


def test_neither_parent_counts_or_can_be_given_an_address(parent: Parent, story: Story) -> None:
    for profile in parent.profiles:
        for step in ("vstats", "set"):
            assert "Operation not supported" in story.step(f"{step}_{profile}")
