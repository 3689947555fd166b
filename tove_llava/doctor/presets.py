"""Check which presets run here, and their needs of memory and disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tove_llava.core.errors import ToveError
from tove_llava.core.text import GIB, markdown_table
from tove_llava.data import get_template
from tove_llava.doctor.finding import Finding
from tove_llava.doctor.machine import Machine
from tove_llava.doctor.preset_sources import SourceState, preset_sources
from tove_llava.llava.build import prepare_tokenizer
from tove_llava.presets import Preset, load_preset
from tove_llava.train.memory import (
    Memory,
    Run,
    answering_memory,
    download_size,
    largest_batch,
    stage_disk,
    training_memory,
)
from tove_llava.train.shapes import Shape, stage_shape

SHORT = 128  # tokens of text next to an image, in a short record


@dataclass(frozen=True)
class Verdict:
    """The verdict on training a stage, or answering, on a machine.

    Attributes:
        memory: its needs with the longest records of the stage, unless ``advice`` says otherwise.
        place: where it needs them.
        reasons: why it does not run; empty when it runs.
        advice: the condition or settings under which it runs, if any.
    """

    memory: Memory
    place: str
    reasons: tuple[str, ...]
    advice: str = ""


def preset_findings(names: Sequence[str], machine: Machine) -> list[Finding]:
    """Check the sources and stages of presets (names or YAML files)."""
    findings = []
    for name in names:
        group = f"preset {name}"
        try:
            preset = load_preset(name)
            states = preset_sources(preset)
            findings += [_source(group, state) for state in states]
            findings += _stages(group, preset, machine, states)
        except ToveError as error:
            findings.append(Finding(group, "settings", str(error), "see the message"))
    return findings


def _source(group: str, state: SourceState) -> Finding:
    details = {"source": state.source, "resolves": state.resolves, "here": state.here}
    return Finding(group, state.key, f"{state.source}: {state.note}", state.remedy, details=details)


def _stages(group: str, preset: Preset, machine: Machine, states: Sequence[SourceState]) -> list[Finding]:
    findings, shape = [], None
    missing = sum(not state.resolves for state in states)
    reasons = (f"{missing} of its {len(states)} sources do not resolve",) if missing else ()
    fetched = any(not state.here for state in states)
    for name in preset.stages:
        try:
            shape = stage_shape(preset, name)
        except ImportError as error:
            reason = f"the Python package {error.name} is not installed"
            findings.append(Finding(group, name, f"does not run here: {reason}", details={"runs": False}))
            continue
        download = download_size(preset, shape) if fetched else 0
        fault = () if missing or fetched else template_fault(preset, name)
        findings.append(_finding(group, name, judge(preset, name, shape, machine, reasons + fault, download)))
    if shape is not None:
        findings.append(_finding(group, "chat", judge_answering(preset, shape, machine, reasons)))
    return findings


def template_fault(preset: Preset, stage_name: str) -> tuple[str, ...]:
    """Return why a stage's template cannot be used with the preset's tokenizer, if so."""
    template = get_template(preset.stage(stage_name).template)
    try:
        template.check(prepare_tokenizer(preset.language, template.name))
    except ToveError as error:
        return (str(error),)
    return ()


def _finding(group: str, name: str, verdict: Verdict) -> Finding:
    need = f"needs {verdict.memory.total / GIB:.1f} GiB {verdict.place}"
    if verdict.reasons:
        state = f"does not run here: {'; '.join(verdict.reasons)} ({need})"
    else:
        state = f"runs here{', ' + verdict.advice if verdict.advice else ''}: {need}"
    details = {
        "runs": not verdict.reasons,
        "reasons": list(verdict.reasons),
        "advice": verdict.advice,
        "bytes_per_device": {**vars(verdict.memory), "total": verdict.memory.total},
    }
    return Finding(group, name, state, details=details)


def judge(
    preset: Preset, stage_name: str, shape: Shape, machine: Machine, missing: tuple[str, ...] = (), download: int = 0
) -> Verdict:
    """Judge whether a training stage runs as its script starts it.

    Args:
        missing: reasons from sources that do not resolve.
        download: bytes that have to be fetched first.
    """
    devices = machine.devices or min(2, machine.cores)  # as tove_llava.train.launcher does
    available = machine.device_bytes if machine.devices else machine.host_bytes // devices
    place = f"on each of {devices} {'GPUs' if machine.devices else 'processes'}"
    run = Run.of(preset, stage_name, devices=devices)
    memory = training_memory(preset, stage_name, shape, run)
    reasons, advice = list(missing), ""
    if preset.stage(stage_name).arguments.get("tf32") and not machine.tf32:
        reasons.append("it needs GPUs with TF32 and bfloat16" if machine.devices else "it needs CUDA GPUs")
    elif memory.total > available:
        found = _fitting(preset, stage_name, shape, run, available)
        if found is None:
            reasons.append(f"{available / GIB:.1f} GiB are free")
        else:
            run, advice = found
            memory = training_memory(preset, stage_name, shape, run)
    if machine.devices and memory.host > machine.host_bytes:
        reasons.append(f"{memory.host / GIB:.0f} GiB of host memory, and {machine.host_bytes / GIB:.0f} GiB are free")
    disk = stage_disk(preset, stage_name, shape) + download
    if disk > machine.disk_bytes:
        reasons.append(f"up to {disk / GIB:.0f} GiB of disk, and {machine.disk_bytes / GIB:.0f} GiB are free")
    return Verdict(memory, place, tuple(reasons), advice)


def _fitting(preset: Preset, stage_name: str, shape: Shape, run: Run, available: int) -> tuple[Run, str] | None:
    """Find smaller batches, or another ZeRO configuration, with which a stage fits.

    A stage of captions, which are short, stays as it is if short ones fit.
    """
    short = replace(run, length=shape.image_tokens + SHORT)
    captions = get_template(preset.stage(stage_name).template).single_turn
    if captions and training_memory(preset, stage_name, shape, short).total <= available:
        return short, f"while captions have at most {SHORT} tokens"
    names = [run.deepspeed, *(name for name in ("zero3", "zero3_offload") if run.deepspeed is not None)]
    for name in dict.fromkeys(names):
        batch = largest_batch(preset, stage_name, shape, replace(run, deepspeed=name), available)
        if batch:
            words = [] if name == run.deepspeed else [f"DEEPSPEED_CONFIG={name}"]
            if batch < run.batch:
                words += [f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {run.batch // batch}"]
            return replace(run, deepspeed=name, batch=batch), f"with {' '.join(words)}"
    return None


def judge_answering(preset: Preset, shape: Shape, machine: Machine, missing: tuple[str, ...] = ()) -> Verdict:
    """Judge whether evaluation and chat run on a machine."""
    memory = answering_memory(preset, shape)
    available = machine.device_bytes if machine.devices else machine.host_bytes
    reasons = list(missing)
    if memory.total > available:
        reasons.append(f"{available / GIB:.1f} GiB are free")
    return Verdict(memory, "on the GPU" if machine.devices else "of memory", tuple(reasons))


def memory_table(names: Sequence[str]) -> str:
    """Write the table of docs/reference/memory.md."""
    header = (
        "preset, stage|trained|records x positions|weights|encoders|1 device|8 devices|short records|host, 8 devices"
    )
    rows = []
    for name in names:
        preset = load_preset(name)
        rows += [_row(preset, stage_name, stage_shape(preset, stage_name)) for stage_name in preset.stages]
        memory = answering_memory(preset, stage_shape(preset, next(iter(preset.stages))))
        needed = (_gib(size) for size in (memory.weights, memory.backbones, memory.total))
        rows.append([f"{preset.name}, chat", "", "1 x 2048", *needed, "", "", "", ""])
    return markdown_table([*header.split("|"), "disk"], rows)


def _row(preset: Preset, stage_name: str, shape: Shape) -> list[str]:
    one, eight = (Run.of(preset, stage_name, devices=devices) for devices in (1, 8))
    short = Run.of(preset, stage_name, devices=8, length=shape.image_tokens + SHORT)
    needed, shared, brief = (training_memory(preset, stage_name, shape, run) for run in (one, eight, short))
    disk = stage_disk(preset, stage_name, shape)
    sizes = (needed.weights, needed.backbones, needed.total, shared.total, brief.total, shared.host, disk)
    title = f"{preset.name}, {stage_name}" + (f" ({one.deepspeed})" if one.deepspeed else "")
    return [title, f"{shape.trained / 1e6:,.1f} M", f"{one.batch} x {one.length}", *map(_gib, sizes)]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size < 100 * GIB else f"{size / GIB:.0f}"
