"""Show what this machine has, lacks, and can run.

Lists versions, devices, free memory and disk, Java, Chromium and the bundled weights; and for each preset whether its
sources are here (or can be fetched) and which of its stages fit into this machine. Loads and downloads nothing.

The exit code is 1 when something that the base needs is missing or damaged.
"""

import argparse
import json
from typing import TYPE_CHECKING

from tove_llava.core.text import listed

if TYPE_CHECKING:
    from tove_llava.doctor import Finding

HELP = "show versions, devices, what is missing, and which presets can run here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON list")
    parser.add_argument(
        "--preset",
        action="append",
        metavar="NAME",
        help="only this preset, a name or a YAML file; may be repeated ('none': no preset)",
    )
    parser.add_argument("--memory", action="store_true", help="print only the stages' needs, as Markdown")


def run(args: argparse.Namespace) -> int:
    from tove_llava.doctor import machine, packages, weights

    if args.memory:
        from tove_llava.doctor.presets import memory_table

        print(memory_table(_presets(args.preset)))
        return 0
    findings = [*machine.system(), *packages.packages(), *machine.devices(), *machine.programs()]
    findings += weights.bundled_weights()
    if not any(finding.remedy for finding in findings if finding.group == "packages"):
        findings += _preset_findings(args.preset)
    if args.json:
        print(json.dumps([vars(finding) for finding in findings]))
    else:
        _show(findings)
    return int(any(finding.required and finding.remedy for finding in findings))


def _presets(given: list[str] | None) -> list[str]:
    from tove_llava.presets import preset_names

    if given is None:
        return sorted(preset_names(), key=lambda name: ("-" in name, name != "tiny", len(name), name))
    return [name for name in given if name != "none"]


def _preset_findings(given: list[str] | None) -> "list[Finding]":
    """Check the presets; needs the base packages, which read the architectures."""
    names = _presets(given)
    if not names:
        return []
    from transformers.utils import logging

    from tove_llava.doctor.machine import this_machine
    from tove_llava.doctor.presets import preset_findings

    logging.set_verbosity_error()
    return preset_findings(names, this_machine())


def _show(findings: "list[Finding]") -> None:
    group = ""
    for finding, line in zip(findings, listed((finding.name, finding.state) for finding in findings), strict=True):
        if finding.group != group:
            group = finding.group
            print(f"{group}:")
        print(line)
    missing = [finding for finding in findings if finding.remedy]
    if not missing:
        print("\nNothing is missing.")
        return
    print("\nmissing or out of date:")
    lines = [f"{finding.name}{_note(finding)}: {finding.remedy}" for finding in missing]
    for line in dict.fromkeys(lines):  # presets share sources
        print(f"  {line}")


def _note(finding: "Finding") -> str:
    return " (optional)" if finding.group == "optional packages" else ""
