"""docs/background/claims.md: a table, a plot and a verdict for each claim."""

# ruff: noqa: E501  (the page's own lines)

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from measures import curve_grid, curve_jobs
from numbers_of_runs import BOTH, Cost, Runs, Study, by_type

from tove_llava.ablation.job_records import today
from tove_llava.ablation.seed_means import SeedMean
from tove_llava.analysis.plots import figure, save
from tove_llava.core.text import markdown_table

STUDIES = yaml.safe_load((Path(__file__).parent / "studies.yaml").read_text())
ARMS = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text())["arms"]
HOLDS, PART, NOT = "**Holds here.**", "**Holds in part.**", "**Does not hold here.**"
UNDEFINED = "not defined, for that gain is not clearly above zero"
Section = Callable[[Study, Path], str]
SECTIONS: dict[str, Section] = {}


def section(name: str) -> Callable[[Section], Section]:
    def add(function: Section) -> Section:
        SECTIONS[name] = function
        return function

    return add


def write_report(study: Study, report: Path, claims: Sequence[str], typed: str) -> None:
    """Write the sections of ``claims``, and plots (``assets/claims-*.png``) next to them.

    The page's other sections stay as they are, with what they say of their own run; claims that never ran say so.

    Args:
        typed: the flags of the study's command.
    """
    from tove_llava.core.files import write_atomically

    assets = report.parent / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    there = sections_of(report.read_text()) if report.is_file() else {}
    parts, written = [HEAD], []
    for name, entry in STUDIES.items():
        key = f"({name})"
        missing = _missing(study, name)
        if name in claims and not missing:
            written.append(name)
            about = f"{entry['claim']}\n\n{provenance(study, name, typed)}\n\n{SECTIONS[name](study, assets)}"
        elif key in there and not _is_empty(there[key]):
            parts.append(there[key])
            continue
        else:
            about = f"{entry['claim']}\n\n{NOT_RUN}{f' ({missing})' if missing else ''}: `bash playground/claims.sh --claims {name}`.\n"
        parts.append(f"## {key} {entry['title']}\n\n{about}")
    known = {f"({name})" for name in STUDIES}
    parts += [text for key, text in there.items() if key not in known]
    write_atomically(report, "\n".join(parts))
    print(f"{report}: {', '.join(written) or 'no claim'} written again")


def sections_of(page: str) -> dict[str, str]:
    """Map "(a)" to claim a's section, others by their whole heading."""
    found: dict[str, str] = {}
    for text in re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]:
        heading = text.partition("\n")[0].removeprefix("## ").strip()
        claim = re.match(r"\([a-z]\)", heading)
        found.setdefault(claim[0] if claim else heading, text.rstrip() + "\n")
    return found


def _is_empty(section: str) -> bool:
    return any(line.startswith(NOT_RUN) for line in section.splitlines()) or len(section.strip().splitlines()) < 2


NOT_RUN = "Not run yet"
HEAD = """# The paper's claims in miniature

Written by `bash playground/claims.sh`. Each section says how it was produced; a later run of some claims replaces their sections and leaves
the others. Preset `tiny`: CLIP, four experts and a language model that this project trained on playground scenes; one pass of 8 records a step
in each stage. Seeds set initial values, order of the data and noise. Every arm has the same data, steps,
batch, learning rates and seeds; the frozen encoders' output is computed once for all.

*±* is the half-width of a 95 % confidence interval over seeds (Student's t); differences are paired by seed. *spatial and depth* is
the mean over left_right, above_below, statement, front_behind and nearer. A claim **holds** when the interval of the difference lies on
the claimed side of zero. This is a miniature: a CLIP that hardly tells shapes apart, experts that know exactly what is asked about. It shows
what the method does, not how much it would gain with a CLIP trained on the web.

*Processor seconds* are those of a claim's runs (training and evaluation) and curves; runs that several claims share count in each of them. Making the
scenes and the frozen encoders' output, once for all runs, is not in them. Each run's numbers are in `results.json` of the folder
`--out` (`outputs/claims`).
"""


def provenance(study: Study, name: str, typed: str) -> str:
    """Describe a section's command, date, commit, machine and cost."""
    runs = [Runs(study, arm) for arm in STUDIES[name]["arms"]]
    curves = curve_jobs(study) if STUDIES[name].get("measured") == "curves" else {}
    whole = Cost.of([*(arm.jobs() for arm in runs), curves])
    count = sum(len(arm.by_seed) for arm in runs)
    commits, dates = whole.distinct("commit"), whole.distinct("date")
    ran = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    written = "" if dates == [today()] else f" (written {today()})"
    also = f" and {study.seeds} curves" if curves else ""
    machines = whole.distinct("machine")
    # A GPU's time is no processor's.
    minutes = "" if "GPU" in "".join(machines) else f", {whole.cpu_seconds / 120:.1f} minutes on two cores"
    resumed = (
        f" Jobs that were interrupted and resumed: {whole.resumed}; their seconds are of the last attempt."
        if whole.resumed
        else ""
    )
    return f"""*Produced* by `bash playground/claims.sh {typed}`, run {ran}{written}, commit {" and ".join(commits)}; {study.seeds} {"seed" if study.seeds == 1 else "seeds"},
{study.train:,} training scenes for each stage, {study.val:,} held-out scenes; {" / ".join(machines)}. {count} runs{also}: {whole.cpu_seconds:,.0f}
processor seconds{minutes}.{resumed}"""


def _missing(study: Study, name: str) -> str:
    found = {arm: len(Runs(study, arm).by_seed) for arm in STUDIES[name]["arms"]}
    lacking = [f"{arm}: {count} of {study.seeds} seeds" for arm, count in found.items() if count < study.seeds]
    if not lacking:
        lacking += [str(file.relative_to(study.out)) for file in _measured(study, name) if not file.is_file()]
    return "; ".join(lacking)


def _measured(study: Study, name: str) -> list[Path]:
    """List a claim's files besides its runs."""
    measured = STUDIES[name].get("measured")
    if measured == "curves":
        return curve_files(study)
    return [study.out / f"{measured}.json"] if measured else []


def curve_files(study: Study) -> list[Path]:
    """List each seed's detach curve."""
    return [folder / "detach_curve.json" for folder in dict.fromkeys(j.output for j in curve_grid(study).jobs.values())]


def verdict(gains: Sequence[SeedMean]) -> str:
    """Judge gains: all clearly above zero, some, or none."""
    clear = sum(gain.low > 0 for gain in gains)
    return HOLDS if clear == len(gains) else PART if clear else NOT


@section("a")
def fusions(study: Study, assets: Path) -> str:
    names = ("tove", "clip", "add", "top1", "channel_concat", "sequence_append")
    arms = [Runs(study, name) for name in names]
    tove, others = arms[0], arms[1:]
    rows = []
    for other in others:
        rows.append([other.name, *(tove.gain(other, row).signed for row in (BOTH, "shape", "counting", "overall"))])
    bars(assets / "claims-fusions.png", arms, (BOTH, "overall"))
    gains = [tove.gain(other, row) for other in others for row in (BOTH, "overall")]
    rest = {other.name: tove.gain(other, "overall") for other in others[1:]}
    better = [name for name, gain in rest.items() if gain.low > 0]
    worse = [name for name, gain in rest.items() if gain.high < 0]
    equal = [name for name in rest if name not in better and name not in worse]
    said = [
        f"against {_list(names)}: {how}"
        for names, how in ((better, "better"), (equal, "no clear difference"), (worse, "worse"))
        if names
    ]
    seconds = ", ".join(f"{arm.name} {arm.seconds():.0f}" for arm in arms)
    return f"""{by_type(arms)}

ToVE's gain, in points, over each:

{markdown_table(["over", BOTH, "shape", "counting", "overall"], rows)}

![Accuracy of each fusion](assets/claims-fusions.png)

Median seconds a run (both stages and evaluation, with whatever else the machine did): {seconds}.

{verdict(gains)} Against plain CLIP {tove.gain(others[0], "overall").signed} points overall; {"; ".join(said)}. The language model was taught to read
36 tokens an image; that it does not learn to use the further tokens of `sequence_append` within this budget says little of that fusion elsewhere.
"""


@section("b")
def data_efficiency(study: Study, assets: Path) -> str:
    shares = (1, 3, 10, 30, 100)
    rows, gains, points = [], [], {"clip": [], "tove": []}
    for share in shares:
        suffix = "" if share == 100 else f"-{share}%"
        clip, tove = (Runs(study, name + suffix) for name in ("clip", "tove"))
        gain = tove.gain(clip, "overall")
        gains.append(gain)
        count = max(1, round(share / 100 * study.train))
        rows.append([f"{share} % ({count})", str(clip.interval("overall")), str(tove.interval("overall")), gain.signed])
        for name, runs in (("clip", clip), ("tove", tove)):
            points[name].append((count, runs.interval("overall")))
    lines(assets / "claims-data.png", points, "training scenes")
    whole = points["clip"][-1][1].mean
    reached = next((share for share, row in zip(shares, points["tove"], strict=True) if row[1].mean >= whole), None)
    less = f"ToVE passes plain CLIP's accuracy on all scenes with {reached} % of them. " if reached else ""
    return f"""The first scenes of the training set, in both stages; always as many steps as one pass over all of them.

{markdown_table(["scenes", "clip", "tove", "gain"], rows)}

![Accuracy against training scenes](assets/claims-data.png)

{less}{verdict(gains)}
"""


@section("c")
def lite(study: Study, assets: Path) -> str:
    clip, tove, merged, tuned = (Runs(study, name) for name in ("clip", "tove", "lite", "clip_tuned"))
    kept = {row: kept_share(tove.gain(clip, row), merged.gain(clip, row)) for row in (BOTH, "overall")}
    speed = json.loads((study.out / "speed.json").read_text())
    bars(assets / "claims-lite.png", [clip, tuned, merged, tove], (BOTH, "overall"))
    over = merged.gain(tuned, BOTH)
    met = kept[BOTH] is not None and kept[BOTH] >= 80
    goal = "met" if met else "missed"
    fair = [merged.gain(tuned, row) for row in (BOTH, "overall")]
    outcome = verdict(fair) if met else (PART if verdict(fair) == HOLDS else NOT)
    merging, tuning = (ARMS[arm]["stages"]["merge"]["flags"] for arm in ("lite", "clip_tuned"))
    about = STUDIES["c"]["about"].format(brought=merging["merge_images_per_record"], further=study.further)
    share = {row: UNDEFINED if value is None else f"{value:.0f} %" for row, value in kept.items()}
    return f"""`lite` is ToVE's model after merging: {about} `clip_tuned` is the fair
baseline: plain CLIP's model, its CLIP tuned in the same stage with the same records and steps, by the language model's loss only (the further
images have no text, so only a merge can use them; its encoder's learning rate is {tuning["encoder_learning_rate"]}).

{by_type([merged, clip, tuned, tove])}

Of ToVE's gain over plain CLIP ToVE-lite keeps, on spatial and depth questions: **{share[BOTH]}** (goal: 80 %, {goal}); overall: {share["overall"]}.
Over `clip_tuned`: {over.signed} on spatial and depth questions, {merged.gain(tuned, "overall").signed} overall.

![Accuracy of ToVE-lite](assets/claims-lite.png)

Only the tower, batch of {speed["batch"]}, {speed["threads"]} thread(s), median of {speed["rounds"]} alternating rounds:

{markdown_table(["tower", "class", "GFLOP an image", "ms an image", "times CLIP"], speed["rows"])}

{outcome} The settings of the merge were chosen before, on another model and in four tries on seed 0 at the default sizes (at
commits up to ab4f225): with these sizes, that seed's numbers are not independent of the choice.
"""


def kept_share(whole: SeedMean, part: SeedMean) -> float | None:
    """Return a gain's kept percent; None unless it is clearly positive."""
    return 100 * part.mean / whole.mean if whole.low > 0 else None


@section("d")
def detach_curve(study: Study, assets: Path) -> str:
    files = curve_files(study)
    curves = [json.loads(file.read_text()) for file in files]
    ranked = json.loads(files[0].with_name("contributions.json").read_text())["overall"]["records"]
    steps = len(curves[0]["steps"])
    rows, points = [], []
    for step in range(steps):
        entries = [curve["steps"][step] for curve in curves]
        score = SeedMean.of([100 * entry["accuracy"] for entry in entries])
        rate = SeedMean.of([entry["images_per_second"] for entry in entries])
        left = {", ".join(entry["experts"]) or "CLIP" for entry in entries}
        rows.append([str(steps - 1 - step), " / ".join(sorted(left)), str(score), f"{rate.mean:.0f}"])
        points.append((steps - 1 - step, score))
    lines(assets / "claims-detach.png", {"tove": points}, "experts left", logarithmic=False)
    half = steps // 2
    scores = [[100 * entry["accuracy"] for entry in curve["steps"]] for curve in curves]
    cost = SeedMean.of([row[0] - row[half] for row in scores])
    spared = SeedMean.of([0.1 * (row[0] - row[-1]) - (row[0] - row[half]) for row in scores])
    return f"""From each seed's ToVE, experts removed one by one, least contribution first, without training again. Contributions were measured on
{ranked} records of the training set; each step was scored on {curves[0]["records"]:,} of {curves[0]["records_in_file"]:,} held-out questions.

{markdown_table(["experts left", "which", "accuracy, %", "images/s"], rows)}

![Accuracy against experts left](assets/claims-detach.png)

Half of the experts taken out cost {cost.signed} points. It counts as slow when that is clearly less than a tenth of what all experts add to
CLIP's tokens: {verdict([spared])} The tower was trained with its experts, so the last row is not CLIP trained without experts.
"""


@section("e")
def balance(study: Study, assets: Path) -> str:
    names = ("tove", "no_balance", "no_noise", "no_balance_no_noise")
    arms = [Runs(study, name) for name in names]
    experts = ("depth", "normal", "edge", "segmentation")
    rows = []
    for arm in arms:
        usage = [SeedMean.of([100 * v for v in arm.gate(name)]) for name in experts]
        entropy = SeedMean.of(arm.gate("entropy"))
        rows.append(
            [arm.name, f"{entropy.mean:.2f} ± {entropy.half:.2f}", *map(str, usage), str(arm.interval("overall"))]
        )
    gains = [arms[0].gain(arm, "overall") for arm in arms[1:]]
    largest = [
        [100 * max(values) for values in zip(*(arm.gate(name) for name in experts), strict=True)] for arm in arms
    ]
    drawn = [SeedMean.of([b - a for a, b in zip(largest[0], other, strict=True)]) for other in largest[1:]]
    return f"""Entropy of the gate (at most {1.386:.2f} nats for four experts) and mean weight of each expert, over the last training steps.

{markdown_table(["arm", "entropy", *(f"{name}, %" for name in experts), "accuracy, %"], rows)}

The largest expert's mean weight is {SeedMean.of(largest[0])} % with both; {drawn[0].signed} points without the balance loss,
{drawn[1].signed} without the noise. That the balance loss keeps the gate from collapsing onto one expert: {verdict(drawn[:1])} That the noise does: {verdict(drawn[1:2])}
ToVE's gain in accuracy is {gains[0].signed} over the arm without the balance loss, {gains[1].signed} over the one without noise,
{gains[2].signed} over the one without both. That both help accuracy: {verdict(gains)}
"""


@section("f")
def residual(study: Study, assets: Path) -> str:
    clip, tove, replace = (Runs(study, name) for name in ("clip", "tove", "replace"))
    sets = [clip.right(seed) for seed in clip.by_seed]
    enough = -(-4 * len(sets) // 5)
    sure = [key for key in sets[0] if sum(found[key] for found in sets) >= enough]
    if not sure:
        return f"{by_type([tove, replace, clip])}\n\nThere is no question that plain CLIP answers well. {NOT}\n"
    shares = {
        arm.name: [100 * sum(arm.right(seed)[key] for key in sure) / len(sure) for seed in arm.by_seed]
        for arm in (tove, replace)
    }
    difference = SeedMean.of([a - b for a, b in zip(shares["tove"], shares["replace"], strict=True)])
    kept = {name: SeedMean.of(values) for name, values in shares.items()}
    return f"""{by_type([tove, replace, clip])}

Questions that plain CLIP answers well, {len(sure):,} of {len(sets[0]):,} (right with at least {enough} of {len(sets)} seeds): ToVE still answers
{kept["tove"]} % of them, replacement {kept["replace"]} %; difference {difference.signed}. Overall: {tove.gain(replace, "overall").signed}.

That keeping CLIP's tokens protects what CLIP knows: {verdict([difference])}
"""


@section("g")
def singles(study: Study, assets: Path) -> str:
    experts = ("depth", "normal", "edge", "segmentation")
    tove, clip = Runs(study, "tove"), Runs(study, "clip")
    beside = [Runs(study, f"clip_{name}") for name in experts]
    instead = [Runs(study, f"{name}_without_clip") for name in experts]
    rows = []
    for runs in (clip, *beside, *instead, tove):
        cells = [str(runs.interval(row)) for row in (BOTH, "shape", "overall")]
        rows.append([runs.name, *cells, tove.gain(runs, "overall").signed])
    best = max(instead, key=lambda runs: runs.interval("overall").mean)
    gains = [tove.gain(runs, "overall") for runs in (*beside, best)]
    equal = [runs.name for runs in (*beside, best) if tove.gain(runs, "overall").low <= 0]
    unless = f" Not clearly beaten: {_list(equal)}." if equal else ""
    bars(assets / "claims-singles.png", [clip, *beside, *instead, tove], ("overall",))
    return f"""{markdown_table(["", BOTH, "shape", "overall", "ToVE's gain"], rows)}

![Accuracy of single experts](assets/claims-singles.png)

The strongest expert without CLIP is {best.name.removesuffix("_without_clip")}. That several experts next to CLIP beat each one next to CLIP, and the
strongest without it: {verdict(gains)}{unless}
"""


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def bars(file: Path, arms: Sequence[Runs], rows: Sequence[str]) -> None:
    drawn = figure(1.6 + 1.1 * len(arms), 3.4)
    axes = drawn.subplots()
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        found = [arm.interval(row) for arm in arms]
        places = [place + index * width for place in range(len(arms))]
        axes.bar(places, [x.mean for x in found], width * 0.95, yerr=[x.half for x in found], capsize=3, label=row)
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(arms))], [arm.name.replace("_", "\n") for arm in arms]
    )
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(loc="upper left", ncols=2, frameon=False)
    save(drawn, file)


def lines(file: Path, points: dict[str, list[tuple[int, SeedMean]]], label: str, *, logarithmic: bool = True) -> None:
    drawn = figure(5.5, 3.4)
    axes = drawn.subplots()
    for name, row in points.items():
        xs, ys = [x for x, _ in row], [y.mean for _, y in row]
        axes.errorbar(xs, ys, [y.half for _, y in row], marker="o", capsize=3, label=name)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")
    axes.legend(frameon=False)
    save(drawn, file)
