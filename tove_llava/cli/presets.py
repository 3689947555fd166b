"""List the presets, or show all keys of one.

usage: tove-llava presets
       tove-llava presets show NAME [--stage STAGE] [--set key.path=value]

What `show` prints is a preset too: tove-llava presets show tiny > mine.yaml; tove-llava train --preset mine.yaml
"""

import argparse

from tove_llava.core.text import listed

HELP = "list the presets, or show one with all keys as YAML"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="{show}")
    show = actions.add_parser("show", help="print a preset as YAML, without 'extends', with the keys at their defaults")
    show.add_argument("name", metavar="NAME", help="name of a preset or path of a .yaml file")
    show.add_argument("--stage", help="only this stage")
    show.add_argument("--set", action="append", default=[], metavar="key.path=value", help="override a key")


def run(args: argparse.Namespace) -> int:
    from tove_llava.presets import dump_preset, load_preset, preset_names

    if args.action is None:
        print("\n".join(listed((name, load_preset(name).description) for name in preset_names())))
        return 0
    preset = load_preset(args.name, args.set)
    if args.stage is not None:
        preset.stages = {args.stage: preset.stage(args.stage)}
    print(dump_preset(preset), end="")
    return 0
