"""DPDK in a guest: its virtio driver and its driver of the IFC VF, unmodified."""
