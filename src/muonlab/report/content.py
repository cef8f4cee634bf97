"""What a report says about a comparison, as plain values: the page, the card and the tables all take it from here."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from muonlab.diagnostics.stability import plateaus, spikes
from muonlab.report import series, style
from muonlab.report.differences import differing, routing_rules
from muonlab.report.reading import Material, finals_of
from muonlab.report.threats import not_learned
from muonlab.studies.curves import lr_optimum


def answers(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One answer per pair: the verdict as a headline in plain words, what it amounts to, and what to do next."""
    stuck = not_learned(summary)
    verdicts = summary.get("verdicts", ())
    result = []
    for verdict in verdicts:
        pair = (verdict["candidate"], verdict["reference"])
        found = answer(verdict, family=len(verdicts))
        both = [name for name in pair if name in stuck]
        if both:
            found["facts"].insert(
                0, f"{' and '.join(both)} did not get below the unigram entropy: counting words does as well."
            )
        found["facts"] += _to_target(summary, *pair)
        result.append(found)
    if not result:
        text = (
            f"{', '.join(stuck)} did not get below the unigram entropy."
            if stuck
            else "No pair of optimizers was judged."
        )
        result.append(no_answer(text))
    return result


def answer(verdict: Mapping[str, Any], *, family: int = 1) -> dict[str, Any]:
    """One paired verdict of a family of so many in plain words."""
    candidate, reference, word = verdict["candidate"], verdict["reference"], verdict.get("verdict")
    mean = series.number(verdict.get("mean"))
    low, high = (series.number(bound) for bound in verdict.get("interval") or (None, None))
    if word in ("better", "worse"):
        headline = f"{candidate} is {word} than {reference} here."
    elif word == "not distinguishable":
        headline = f"{candidate} and {reference} cannot be told apart here."
    else:
        headline = f"No verdict on {candidate} against {reference}."
    facts = []
    if math.isfinite(mean):
        facts.append(
            f"Mean difference {style.signed(mean)} nats per token: perplexity is {style.short(math.exp(mean))} times {reference}’s."
        )
    if math.isfinite(low) and math.isfinite(high):
        facts.append(
            f"{verdict['confidence']:.0%} interval {style.signed(low)} to {style.signed(high)} from {_seeds(verdict)}."
        )
    failed = verdict.get("failed") or {}
    facts += [
        f"{name} failed on seed {style.short(failed[side])}: no pair counts there."
        for side, name in (("candidate", candidate), ("reference", reference))
        if failed.get(side)
    ]
    effect = series.number(verdict.get("detectable_effect"))
    if math.isfinite(effect):
        facts.append(f"A true difference of {style.loss(effect)} would have been found in 8 of 10 such studies.")
    return {
        "word": word or "no verdict",
        "color": style.VERDICT_COLORS.get(word or "", style.MUTED),
        "headline": headline,
        "facts": facts,
        "next": _next(verdict),
        "p_value": series.number(verdict.get("p_value")),
        "holm": verdict.get("holm") if family > 1 else None,
        "sentence": verdict.get("sentence"),
        "group": candidate,
    }


def no_answer(text: str) -> dict[str, Any]:
    """The answer where nothing was judged, with the reason."""
    return {"word": "no verdict", "color": style.MUTED, "headline": "No verdict.", "facts": [text], "next": "", "holm": None,
            "p_value": math.nan, "sentence": None, "group": None}  # fmt: skip


def strips(verdicts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """Where zero, the interval, the mean and each seed lie on one common scale, in per cent of its width."""
    numbers = [0.0]
    for verdict in verdicts:
        numbers += [
            series.number(value) for value in (*verdict.get("differences", ()), *(verdict.get("interval") or ()))
        ]
    finite = [value for value in numbers if math.isfinite(value)]
    margin = 0.08 * (max(finite) - min(finite)) or 0.01
    low, high = min(finite) - margin, max(finite) + margin

    def place(value: Any) -> float:
        return round(100 * (series.number(value) - low) / (high - low), 3)

    result: list[dict[str, Any] | None] = []
    for verdict in verdicts:
        values = [value for value in verdict.get("differences", ()) if math.isfinite(series.number(value))]
        if not values:
            result.append(None)
            continue
        seeds = verdict.get("seeds") or range(1, len(values) + 1)
        ends = [series.number(bound) for bound in verdict.get("interval") or (None, None)]
        bar = (place(ends[0]), place(ends[1]) - place(ends[0])) if all(map(math.isfinite, ends)) else None
        dots = [
            {"at": place(value), "title": f"seed {seed}: {style.signed(value)} nats"}
            for seed, value in zip(seeds, values)
        ]
        result.append({"zero": place(0.0), "mean": place(verdict["mean"]), "bar": bar, "dots": dots})
    return result


def overview(material: Material, name: str) -> dict[str, Any]:
    """One optimizer in one row: final loss with its spread, what it cost, what was chosen, how wide the good range is."""
    summary = material.summary
    entries = [entry for entry in summary.get("finals", ()) if entry["optimizer"] == name]
    losses = [x for e in entries if math.isfinite(x := series.number(e.get("report_cross_entropy")))]
    mean = sum(losses) / len(losses) if losses else math.nan
    spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1)) if len(losses) > 1 else math.nan
    width = series.sensitivity(series.trials_of(summary, name))
    choice = (summary.get("chosen") or {}).get(name) or {}
    runs = finals_of(summary, material.runs, name)
    memory = [series.number(run.get("peak_memory_bytes")) for run in runs]
    speed = [series.number(run.get("updates_per_second")) for run in runs]
    return {
        "name": name,
        "loss": mean,
        "spread": spread,
        "finished": f"{len(losses)} of {len(entries)}",
        "bits": _mean([entry.get("bits_per_byte") for entry in entries]),
        "seconds": _mean([entry.get("seconds") for entry in entries]),
        "speed": sum(speed) / len(speed) if speed else math.nan,
        "memory": max(memory, default=math.nan),
        "chosen": choice.get("values") or {},
        "edge": bool(choice.get("edge")),
        "range": width,
        "open": bool(width and (width.open_low or width.open_high)),
    }


def efficiency(material: Material, name: str) -> dict[str, Any] | None:
    """What an optimizer's final runs bought: nats below the unigram entropy, in all, per minute of training, per GB of
    peak memory; None when it bought nothing."""
    row = overview(material, name)
    entropy = series.number((material.summary.get("gate") or {}).get("unigram_entropy"))
    gain = entropy - row["loss"]
    if not gain > 0:
        return None
    return {
        "name": name,
        "gain": gain,
        "per_minute": gain / row["seconds"] * 60 if row["seconds"] > 0 else math.nan,
        "per_gigabyte": gain / row["memory"] * 1e9 if row["memory"] > 0 else math.nan,
    }


def learning_rates(summary: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The sweep of one optimizer in numbers: what was tried, the good range, and a parabola's optimum; None without one.

    The parabola is fitted within 3.5 octaves of the best, where a loss against log lr is about one.
    """
    swept = series.sweep(series.trials_of(summary, name))
    width = series.sensitivity(series.trials_of(summary, name))
    if width is None:
        return None
    near = [trial for trial in swept if abs(math.log2(trial.lr / width.best)) <= 3.5]
    rates = sorted({trial.lr for trial in swept})
    fit = lr_optimum([t.lr for t in near], [t.loss for t in near])
    return {"name": name, "tried": rates, "width": width, "optimum": fit}


def protocol(material: Material) -> list[tuple[str, str]]:
    """What was done, as (term, explanation)."""
    summary, budget = material.summary, material.summary["budget"]
    tokens = series.number(budget.get("tokens_per_update")) * series.number(budget.get("updates"))
    knobs = budget.get("knobs") or {}
    same = len({str(value) for value in knobs.values()}) == 1
    terms = [
        ("Tuning", f"{budget['trials']} trials for each optimizer, all with one seed that no final run uses; the best on the tune split is chosen."),
        ("Knobs searched", style.short(next(iter(knobs.values()))) if same else "; ".join(f"{n}: {style.short(k)}" for n, k in knobs.items())),
        ("Final runs", f"{budget['seeds']} seeds for each optimizer with its chosen values; a seed fixes initial weights and order of batches for all, so differences are taken by seed."),
        ("Length of every run", f"{style.count(budget['updates'])} updates of {style.count(budget.get('tokens_per_update'))} tokens, {style.count(tokens)} tokens in all; tuning and judging happen at the same length."),
        ("Judged on", "the report split, which no choice has seen: next-token cross-entropy at the end of training, whatever was optimised."),
        ("Verdict", "better or worse if the confidence interval of the mean paired difference (Student’s t) excludes zero, otherwise not distinguishable."),
        ("Stopped early", stopped_text(summary)),
        ("Looks", looks_text(summary)),
        ("Noise floor", noise_text(summary.get("noise"), "optimizers")),
        ("Time", "training seconds without evaluation, compilation and logging."),
    ]  # fmt: skip
    spent = budget.get("spent") or {}
    if spent:
        text = "; ".join(
            f"{name}: {entry['trials']} trials, {style.duration(entry.get('training_seconds'))}"
            for name, entry in spent.items()
        )
        terms.insert(2, ("Spent on tuning", text))
    if summary.get("wall_seconds"):
        terms.append(
            (
                "Wall time",
                f"{style.duration(summary['wall_seconds'])} for everything, data included, at the last call of the command.",
            )
        )
    return [term for term in terms if term[1] not in ("", "–")]


def noise_text(floor: Mapping[str, Any] | None, pooled: str) -> str:
    """How far runs lie apart by chance alone, in words; empty where nothing was repeated."""
    spread, apart = (series.number((floor or {}).get(key)) for key in ("spread", "difference"))
    if not math.isfinite(spread):
        return ""
    return f"runs that differ in nothing but the seed scatter by {style.loss(spread)} nats (standard deviation, pooled over {pooled}); two of them lie more than {style.loss(apart)} apart in 1 of 20 cases."


def looks_text(summary: Mapping[str, Any]) -> str:
    """How often a verdict was seen before this one; empty where that was not recorded."""
    looks = summary.get("looks") or ()
    if len(looks) < 2:
        return "one: the verdict was made once, with the budget that was set before." if looks else ""
    steps = ", then ".join(f"{look['trials']} trials and {look['seeds']} seeds" for look in looks)
    return f"{len(looks)}: verdicts were made with {steps}."


def stopped_text(summary: Mapping[str, Any]) -> str:
    """How many shorter trials a search made to choose those of full length; empty without any."""
    lengths = sorted({entry["updates"] for entry in summary.get("stopped_early") or ()})
    if not lengths:
        return ""
    counts = [
        f"{sum(e['updates'] == n for e in summary['stopped_early'])} after {style.count(n)} updates" for n in lengths
    ]
    return f"trials that the search did not take to full length: {', '.join(counts)}. Their losses only chose which went on."


def trial_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tuning trials of full length as rows: optimizer, stage, values, loss, status."""
    choice = summary.get("chosen") or {}
    return [
        {**_trial(entry), "chosen": (choice.get(entry["optimizer"]) or {}).get("trial") == entry["index"]}
        for entry in summary.get("trials", ())
    ]


def stopped_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The shorter trials of a search as rows, the shortest last."""
    return sorted(map(_trial, summary.get("stopped_early") or ()), key=lambda row: -row["updates"])


def _trial(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = entry.get("values") or {}
    return {
        **entry,
        "message": entry.get("message"),
        "seconds": entry.get("seconds"),
        "loss": series.number(entry.get("tune_cross_entropy")),
        "lr": values.get("lr"),
        "others": {key: value for key, value in values.items() if key != "lr"},
    }


def final_rows(material: Material) -> list[dict[str, Any]]:
    """The final runs as rows, with what their directories add."""
    rows = []
    for entry in material.summary.get("finals", ()):
        run = material.runs.get(entry.get("directory"), {})
        row = {
            **entry,
            "message": entry.get("message") or run.get("message"),
            "updates": run.get("updates"),
            "best": run.get("updates_to_best"),
        }
        history = run.get("history") or {"train": [], "eval": []}
        evaluated = series.evaluations(run, "report") if run else []
        smooth = {
            "spikes": spikes([series.number(step["loss"]) for step in history["train"]]) if run else None,
            "plateaus": plateaus([step["cross_entropy"] for step in evaluated]) if run else None,
        }
        rows.append({**row, **smooth, "speed": run.get("updates_per_second"), "memory": run.get("peak_memory_bytes")})
    return rows


def differences(material: Material) -> dict[str, Any]:
    """Configuration keys in which the chosen runs of the optimizers differ; and any that differ between seeds of one."""
    names, firsts, odd = [], [], {}
    for name in material.summary["optimizers"]:
        runs = finals_of(material.summary, material.runs, name)
        if runs:
            names.append(name)
            firsts.append(runs[0]["config"])
            odd.update({f"{name}: {key}": row for key, row in differing([run["config"] for run in runs]).items()})
    return {"names": names, "rows": differing(firsts), "odd": odd}


def routing(material: Material) -> list[dict[str, Any]]:
    """Which rule updates which parameters, per optimizer, equal rows joined."""
    tables = []
    for name in material.summary["optimizers"]:
        runs = finals_of(material.summary, material.runs, name)
        if runs and runs[0].get("routing"):
            rows = routing_rules(runs[0]["routing"])
            columns = list(dict.fromkeys(key for row in rows for key in row if key != "names"))
            tables.append({"group": name, "columns": columns, "rows": rows})
    return tables


def setting(material: Material) -> list[tuple[str, str]]:
    """Model, data, machine and versions, as (term, value)."""
    run: Mapping[str, Any] = next(iter(material.runs.values()), {})
    data, parameters = run.get("data") or {}, run.get("parameters") or {}
    rows = [
        ("Model", str(material.summary.get("setting", {}).get("model") or "")),
        ("Parameters", ", ".join(f"{kind} {style.count(count)}" for kind, count in parameters.items())),
        ("Corpus", str(data.get("corpus") or "")),
        ("Tokens", ", ".join(f"{split} {style.count(count)}" for split, count in (data.get("tokens") or {}).items())),
        ("Vocabulary", style.count(data.get("vocab_size"))),
        ("Unigram entropy", f"{style.loss(data.get('unigram_entropy'))} nats per token"),
        ("Passes over the training text", style.short(data.get("epochs"), 3)),
        ("Checksum of the data", str(data.get("checksum") or "")),
        ("Device", f"{run.get('device')}, {run.get('threads')} threads per run, program {run.get('program')}"),
        (
            "Versions",
            ", ".join(
                f"{key} {value}" for key, value in (run.get("versions") or {}).items() if value and key != "argv"
            ),
        ),
    ]
    return [(term, value) for term, value in rows if value and value != "–"] if run else []


def _to_target(summary: Mapping[str, Any], candidate: str, reference: str) -> list[str]:
    """What the candidate needed to reach the reference's final loss, beside what the reference needed."""
    wanted = f"{reference}'s final loss"
    row = next((r for r in summary.get("to_target", ()) if r["optimizer"] == candidate and r["target"] == wanted), None)
    if row is None:
        return []
    budget = style.count((summary.get("budget") or {}).get("updates"))
    updates, seconds = series.number(row.get("updates")), series.number(row.get("seconds"))
    if not math.isfinite(updates):
        return [f"{candidate} did not reach {reference}’s final loss in {budget} updates ({row['reached']} seeds)."]
    theirs = _mean([e.get("seconds") for e in summary.get("finals", ()) if e["optimizer"] == reference])
    text = f"{candidate} reached {reference}’s final loss after {style.count(updates)} of {budget} updates"
    if math.isfinite(seconds) and math.isfinite(theirs):
        text += f" and {style.duration(seconds)} of training, where {reference} took {style.duration(theirs)}"
    return [text + "."]


def _next(verdict: Mapping[str, Any]) -> str:
    if verdict.get("verdict") not in ("better", "worse", "not distinguishable"):
        return "Train longer, or search other learning rates: until a model learns more than word counts there is nothing to compare."
    if verdict.get("verdict") == "not distinguishable":
        needed = series.number(verdict.get("seeds_needed"))
        if len(verdict.get("differences", ())) < 2:
            return "Run at least three seeds: one has no error bar."
        if math.isfinite(needed) and needed <= 200:
            return f"If the true difference is as large as the one seen, about {needed:.0f} seeds would show it."
        return "If there is a difference, it is too small to matter at this size of study."
    return ""


def _seeds(verdict: Mapping[str, Any]) -> str:
    count = len(verdict.get("differences", ()))
    return f"{count} paired seed{'s' if count != 1 else ''}"


def _mean(values: Sequence[Any]) -> float:
    numbers = [number for value in values if math.isfinite(number := series.number(value))]
    return sum(numbers) / len(numbers) if numbers else math.nan
