"""Merge experts into one CLIP, which learns the tower's tokens (ToVE-lite).

usage: tove-llava merge --model DIR --data_path JSON --image_folder DIR --output_dir DIR [flags of 'tove-llava train']

The settings are those of the model's preset, or of --preset. The model may be stage 2's (the merge follows it) or stage
1's (the merge replaces stage 2). On several GPUs: tove-llava launch merge.
"""

import argparse

HELP = "merge a model's experts into one CLIP, which replaces them (ToVE-lite)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # The trainer parses every flag but --model and --preset.
    parser.prefix_chars = "\0"
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    if not args.arguments or {"-h", "--help"} & set(args.arguments):
        print(__doc__)
        return 0
    from tove_llava.checkpoints.manifest import Manifest
    from tove_llava.cli.train import read_benchmarks
    from tove_llava.core.errors import ConfigError
    from tove_llava.presets import preset_names
    from tove_llava.train.run import main

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--model", "--preset"):
        parser.add_argument(flag, nargs="?")
    given, words = parser.parse_known_args(args.arguments)
    folder, preset = given.model, given.preset
    if not folder:
        raise ConfigError("--model DIR is needed: the folder of the model to merge")
    if preset is None:
        preset = Manifest.read(folder).preset
        if preset not in preset_names():
            raise ConfigError(
                f"{folder} was trained with the preset {preset!r}, which is a file; name it with --preset"
            )
    words = ["--pretrained", folder, "--preset", preset, *words, "--stage", "merge"]
    return main(words, command="merge", make_benchmarks=read_benchmarks)
