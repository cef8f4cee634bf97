"""Commands that look: what there is, what a model costs, what lies on disk, what was found."""

from pathlib import Path
from typing import Any

from muonlab import __version__
from muonlab.cli.running import cores
from muonlab.errors import InputError, unknown


def cmd_list(options: Any) -> None:
    from muonlab.data import CORPORA
    from muonlab.models import SUMMARIES
    from muonlab.optim.registry import OPTIMIZERS
    from muonlab.optim.schedules import SCHEDULES
    from muonlab.studies.search import STRATEGIES
    from muonlab.training.losses import LOSSES
    from muonlab.training.trackers import TRACKERS

    kinds: dict[str, dict[str, str]] = {
        "optimizers": {name: entry.summary for name, entry in OPTIMIZERS.items()},
        "models": dict(SUMMARIES),
        "corpora": {name: corpus.summary for name, corpus in CORPORA.items()},
        "schedules": dict(SCHEDULES),
        "losses": LOSSES,
        "searches": {name: strategy.summary for name, strategy in STRATEGIES.items()},
        "trackers": TRACKERS,
    }
    if options.what and options.what not in kinds:
        raise unknown("kind", options.what, kinds)
    for kind, entries in kinds.items():
        if options.what in (None, kind):
            print(kind)
            for name, summary in entries.items():
                print(f"  {name:18s} {summary}")


def cmd_inspect(options: Any) -> None:
    from muonlab.flags import read_overrides
    from muonlab.report.inspection import inspection
    from muonlab.training.config import from_dict, merge

    config = from_dict({"model": options.model, "optimizer": options.optimizer})
    print(inspection(from_dict(merge(config.to_dict(), read_overrides(config, options.rest))), options.model))


def cmd_data(options: Any) -> None:
    from muonlab.data import cached_datasets, prepare
    from muonlab.flags import read_overrides
    from muonlab.report.tables import size
    from muonlab.training.config import from_dict

    if options.action == "list":
        for entry in cached_datasets():
            print(f"{size(entry['size']):>10}  {entry.get('corpus', '?'):12s}  {entry['path']}")
        return
    config = from_dict({"data": options.names[0]} if options.names else {})
    from muonlab.training.config import merge

    dataset = prepare(from_dict(merge(config.to_dict(), read_overrides(config, options.rest))).data, progress=True)
    for key, value in dataset.describe().items():
        print(f"{key}: {value}")


def cmd_runs(options: Any) -> None:
    from muonlab.report.tables import print_runs, runs_difference, size
    from muonlab.training.tracking import delete_run, disk_bytes, find_runs

    root = Path(options.root)
    if options.action == "list":
        print_runs(find_runs(root))
    elif options.action == "diff":
        print(runs_difference([Path(path) for path in options.paths]))
    elif options.action == "disk":
        for path in find_runs(root):
            print(f"{size(disk_bytes(path)):>10}  {path}")
        print(f"{size(disk_bytes(root)):>10}  {root} in all")
    else:
        if not options.paths:
            raise InputError("name the runs to delete: muonlab runs delete runs/NAME")
        for path in options.paths:
            delete_run(Path(path))
            print(f"deleted {path}")


def cmd_report(options: Any) -> None:
    from muonlab.report import print_side_by_side, print_study, write_report, write_run
    from muonlab.studies.judge import PLAN, SUMMARY, judge
    from muonlab.training.tracking import find_runs

    studies = [path for path in map(Path, options.paths) if (path / PLAN).exists()]
    for path in map(Path, options.paths):
        if path in studies:
            judge(path)  # the summary is written again from the run directories
            print_study(path)
        if (path / SUMMARY).exists():
            written = write_report(path)
        else:
            runs = find_runs(path)
            if not runs:
                raise InputError(f"{path} holds neither a comparison, a study nor a run")
            written = [file for run in runs for file in [write_run(run)]]
        for file in written:
            print(file)
    if len(studies) > 1:
        print_side_by_side(studies)


def cmd_claims(options: Any) -> None:
    import shlex

    from rich.console import Console

    from muonlab.report.claims import claims_table, write_page
    from muonlab.studies.claims import judge
    from muonlab.studies.ledger import read_ledger

    ledger = read_ledger(options.ledger)
    judged = judge(ledger, options.paths)
    Console().print(claims_table(judged))
    output = options.output or ledger.path.with_suffix(".md")
    print(write_page(ledger, judged, output, shlex.join(["muonlab", *options.arguments])))


def cmd_doctor(options: Any) -> None:
    import importlib.util
    import platform

    import torch

    from muonlab.data import cache_home, cached_datasets
    from muonlab.report.tables import size
    from muonlab.training.trackers import TRACKERS

    print(f"muonlab   {__version__}")
    print(f"python    {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch     {torch.__version__}")
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    print(f"device    {', '.join(gpu) or 'cpu'}")
    print(f"triton    {'found' if importlib.util.find_spec('triton') else 'not installed (plain torch is used)'}")
    print(f"threads   {torch.get_num_threads()} of {cores()} cores")
    cached = list(cached_datasets())
    print(f"cache     {cache_home()} ({len(cached)} data sets, {size(sum(entry['size'] for entry in cached))})")
    extras = {"lab": "tokenizers", "hub": "datasets", **{name: name for name in ("optuna", *TRACKERS)}}
    missing = [name for name, module in extras.items() if importlib.util.find_spec(module) is None]
    print(f"extras    missing: {', '.join(missing) or 'none'}")
