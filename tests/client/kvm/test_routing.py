from client.kvm.routing import Chip, IrqchipRoute, MsiRoute


def test_a_route_to_a_pin_is_the_chip_and_the_pin() -> None:
    entry = IrqchipRoute(gsi=10, chip=Chip.PIC_SLAVE, pin=2).entry()
    assert (entry.gsi, entry.type, tuple(entry.u[:3])) == (10, 1, (1, 2, 0))


def test_a_route_to_a_local_apic_is_a_message() -> None:
    entry = MsiRoute(gsi=3, vector=0x43).entry()
    assert (entry.gsi, entry.type, tuple(entry.u[:4])) == (3, 2, (0xFEE0_0000, 0, 0x43, 0))


def test_a_message_that_is_a_level_says_so_and_where_it_goes() -> None:
    route = MsiRoute(gsi=3, vector=0x43, destination=5, level=True)
    assert (route.address, route.data) == (0xFEE0_5000, 0xC043)
