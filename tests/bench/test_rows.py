"""A row that fails, dies or hangs costs only itself, and clocks do the arithmetic they say."""

import os
import time

import pytest
import torch

from muonlab.bench.rows import rows
from muonlab.bench.timing import Stopwatch, milliseconds, ratio, spread


def measured(spec):
    """What rows of these tests measure: as the specification says."""
    if spec["what"] == "raise":
        raise RuntimeError("the device is gone\nand much more")
    if spec["what"] == "die":
        os._exit(7)
    if spec["what"] == "hang":
        time.sleep(60)
    return {"twice": 2 * spec["n"], "process": os.getpid()}


def test_in_this_process_an_error_is_one_line_and_the_next_row_is_measured():
    specs = [{"what": "raise"}, {"what": "work", "n": 3}]
    first, second = rows(measured, specs, isolate=False)
    assert first == {"what": "raise", "failed": "RuntimeError: the device is gone"}
    assert second["twice"] == 6


def test_a_row_for_a_device_that_is_not_there_fails_rather_than_run_on_another():
    (row,) = rows(measured, [{"what": "work", "n": 3, "device": "cuda:63"}], isolate=False)
    assert "failed" in row
    assert "twice" not in row


def test_isolated_rows_survive_errors_deaths_and_hangs_of_others():
    kinds = ["work", "work", "die", "work", "hang", "raise", "work"]
    found = list(rows(measured, [{"what": k, "n": i} for i, k in enumerate(kinds)], isolate=True, limit_s=2))
    assert [row.get("twice") for row in found] == [0, 2, None, 6, None, None, 12]
    assert found[2]["failed"] == "its process died with exit code 7"
    assert found[4]["failed"] == "took longer than 2 s"
    assert found[5]["failed"] == "RuntimeError: the device is gone"
    assert found[0]["process"] == found[1]["process"] != os.getpid()
    assert found[3]["process"] != found[0]["process"]


def test_no_row_begins_after_the_deadline():
    (row,) = rows(measured, [{"what": "work", "n": 1}], isolate=False, deadline=time.monotonic() - 1)
    assert row["failed"].startswith("not begun")


def test_spread_and_ratio_are_quartiles_also_of_one_measurement():
    assert spread([5.0, 1.0, 3.0]) == {"median": 3.0, "quartile_low": 1.0, "quartile_high": 5.0}
    assert spread([2.0]) == {"median": 2.0, "quartile_low": 2.0, "quartile_high": 2.0}
    assert ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])["median"] == 2.0


def test_work_is_called_after_its_preparation_each_time():
    calls = []
    times = milliseconds(lambda: calls.append("work"), torch.device("cpu"), 4, lambda: calls.append("before"))
    assert calls == ["before", "work"] * (3 + 4 + 4)
    assert times["host_ms"] is None
    assert times["alone_ms"]["quartile_low"] <= times["alone_ms"]["median"]


def test_a_stopwatch_adds_up_the_phases_of_all_micro_batches():
    watch = Stopwatch(torch.device("cpu"))
    watch.marks = [
        ("forward", 0.0),
        ("backward", 1.0),
        ("forward", 3.0),
        ("backward", 4.5),
        ("optimizer", 5.0),
        ("end", 9.0),
    ]
    assert watch.read() == pytest.approx({"forward": 2500.0, "backward": 2500.0, "optimizer": 4000.0})
