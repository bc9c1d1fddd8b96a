from server.libvfio_user import Generation, Limit, limits_of


def test_names_are_unique_and_say_what_and_why() -> None:
    labels = [limit.label for limit in Limit]
    assert len(set(labels)) == len(labels) == len(list(Limit))
    for limit in Limit:
        assert limit.label == limit.label.lower()
        assert limit.generations
        assert not limit.what.endswith(".")
        assert not limit.why.endswith(".")


def test_each_generation_has_its_own() -> None:
    old, modern = set(limits_of(Generation.V2022)), set(limits_of(Generation.V2026))
    assert {Limit.DMA_WINDOWS, Limit.DEVICE_FEATURE, Limit.MESSAGE_DMA} <= old - modern
    assert {Limit.IO_EVENTFDS, Limit.IN_BAND_DMA} <= modern - old
    assert {Limit.WRITE_MULTI, Limit.SHARED_VECTORS} <= old & modern
