"""The command that measures: `muonlab bench`."""

import importlib.util
from pathlib import Path
from typing import Any

from muonlab.errors import InputError, unknown

KINDS = {
    "step": ("sets", "peers", "repeats"),
    "train": ("models", "programs", "optimizers", "repeats", "updates"),
    "profile": ("models", "programs", "optimizers", "updates"),
    "all": (),
}
"""Benchmarks, and the options that each has besides those of all."""


def cmd_bench(options: Any) -> None:
    from rich.console import Console

    from muonlab.bench import session
    from muonlab.bench.parameter_sets import SETS
    from muonlab.bench.peers import PEERS
    from muonlab.training.loop import READ_EVERY

    if options.kind not in KINDS:
        raise unknown("benchmark", options.kind, KINDS)
    for name in sorted({name for names in KINDS.values() for name in names} - set(KINDS[options.kind])):
        if getattr(options, name) is not None:
            known = ", ".join(f"--{name}" for name in KINDS[options.kind]) or "only those of every benchmark"
            raise InputError(f"bench {options.kind} has no --{name}; it has {known}")
    output = Path(options.output) if options.output else None
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("the roofline figure needs matplotlib; pip install 'muonlab[lab]', or leave --output out")
    for name in ("repeats", "updates"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    console = Console(width=None if Console().is_terminal else 160)
    if options.kind == "all":
        if output is None:
            raise InputError("bench all writes several files: give their folder with --output DIR")
        written = session.run_all(options.device, options.threads, output, quick=options.quick, say=console.print)
        if not written:
            raise InputError("no part of the benchmark could be measured")
        return
    shared = session.Session(
        options.kind, options.device, options.threads, output, quick=options.quick, say=console.print
    )
    cuda = shared.device.type == "cuda"
    few = options.quick or not cuda
    models = options.models or (["tiny"] if options.quick else ["moe-79m"] if cuda else ["micro", "dense-128"])
    programs = options.programs or ["eager", *([] if options.quick else ["compile"]), *(["graph"] if cuda else [])]
    repeats = options.repeats or (3 if few else 30)
    # on a GPU as many updates in a row as the loop makes between two looks at it
    rounds, updates = (3, 1) if few else (8, READ_EVERY)
    if options.kind == "step":
        sets = options.sets or ([name for name in SETS if name != "tiny"] if cuda else ["tiny"])
        peers = [name for name in PEERS if not (options.quick and name == "compiled-stack")]  # which compiles for long
        session.run_step(shared, sets, options.peers or peers, repeats)
    elif options.kind == "train":
        optimizers = options.optimizers or ["muon", "adamw"]
        session.run_train(shared, models, programs, optimizers, options.repeats or rounds, options.updates or updates)
    else:
        wanted = options.programs or [programs[-1]]
        session.run_profile(
            shared, options.models or models[:1], wanted, options.optimizers or ["muon"], options.updates or 3
        )
