"""A lease has one holder; it outlives no holder for long."""

import os
import subprocess
import sys
import time

from muonlab.studies.leases import Lease


def test_a_lease_has_one_holder_until_it_is_given_back(tmp_path):
    first, second = Lease(tmp_path / "run.lease"), Lease(tmp_path / "run.lease")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_nobody_refreshes_expires(tmp_path):
    path = tmp_path / "run.lease"
    path.write_text("another-machine 1 abc")
    lease = Lease(path, expires=60)
    assert not lease.acquire()
    os.utime(path, (time.time() - 61, time.time() - 61))
    assert lease.acquire()
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_refreshes_its_lease(tmp_path):
    path = tmp_path / "run.lease"
    lease = Lease(path, expires=0.2)
    assert lease.acquire()
    time.sleep(0.5)  # longer than it is good for
    assert not Lease(path, expires=0.2).acquire()
    assert not lease.lost
    lease.release()


def test_the_lease_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path):
    path = tmp_path / "run.lease"
    code = f"import os; from pathlib import Path; from muonlab.studies.leases import Lease; Lease(Path({str(path)!r})).acquire(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert path.exists()
    lease = Lease(path)
    assert lease.acquire()
    lease.release()


def test_a_holder_that_slept_too_long_learns_that_it_lost_its_lease_and_leaves_the_new_one_alone(tmp_path):
    path = tmp_path / "run.lease"
    slow = Lease(path, expires=0.2)
    assert slow.acquire()
    path.write_text("another-machine 1 abc")
    deadline = time.time() + 5
    while not slow.lost and time.time() < deadline:
        time.sleep(0.02)
    assert slow.lost
    slow.release()
    assert path.read_text() == "another-machine 1 abc"
