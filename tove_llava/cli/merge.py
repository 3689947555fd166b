"""Merge experts into one CLIP: a copy of CLIP learns the tower's tokens (ToVE-lite).

usage: tove-llava merge --model DIR --data_path JSON --image_folder DIR --output_dir DIR [flags of 'tove-llava train']

The settings are those of the model's preset, or of --preset. The model may be stage 2's (the merge follows it) or stage
1's (the merge replaces stage 2). Under DeepSpeed: bash scripts/merge.sh.
"""

import argparse

HELP = "merge a model's experts into one CLIP, which replaces them (ToVE-lite)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # The trainer parses every flag but --model and --preset.
    parser.prefix_chars = "\0"
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    words = list(args.arguments)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    from tove_llava.checkpoints.manifest import Manifest
    from tove_llava.core.errors import ConfigError
    from tove_llava.presets import preset_names
    from tove_llava.train.run import main

    folder = _take(words, "--model")
    if not folder:
        raise ConfigError("--model DIR is needed: the folder of the model to merge")
    preset = _take(words, "--preset")
    if preset is None:
        preset = Manifest.read(folder).preset
        if preset not in preset_names():
            raise ConfigError(
                f"{folder} was trained with the preset {preset!r}, which is a file; name it with --preset"
            )
    return main(["--pretrained", folder, "--preset", preset, *words, "--stage", "merge"], command="merge")


def _take(words: list[str], flag: str) -> str | None:
    """Remove ``--flag VALUE`` or ``--flag=VALUE`` from ``words``, and return the value."""
    for at, word in enumerate(words):
        if word == flag:
            value = words[at + 1] if at + 1 < len(words) else ""
            del words[at : at + 2]
            return value
        if word.startswith(f"{flag}="):
            del words[at]
            return word.partition("=")[2]
    return None
