"""The default limit of memory, for machines that tell how much they have and for those that do not."""

import os

import jax
import pytest
from pkjax.linalg.memory import default_memory_limit


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_an_accelerator_offers_half_of_its_own_memory_however_many_there_are(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_limit": 80 * 10**9})])
    assert default_memory_limit() == default_memory_limit(8) == 40 * 10**9


def test_devices_of_one_cpu_share_half_of_the_machines_memory(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert default_memory_limit() == 2048 * 1000
    assert default_memory_limit(4) == 512 * 1000


@pytest.mark.parametrize("error", [ValueError, OSError, AttributeError])
def test_a_system_that_does_not_tell_is_taken_to_have_four_gibibytes(monkeypatch, error):
    def fails(name):
        raise error

    monkeypatch.setattr(jax, "local_devices", lambda: [Device({})])
    monkeypatch.setattr(os, "sysconf", fails)
    assert default_memory_limit() == 2**31
