"""Remove experts from a trained model.

--curve removes them one by one, the least contributing first, and measures loss, accuracy and speed at each step.
--experts, --keep and --max-latency-ms write a smaller checkpoint to --out. It does not need the removed experts'
weights, and computes exactly what the whole model does with them masked. A model without experts is plain CLIP.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from tove_llava.cli._flags import (
    add_calibration,
    add_loading,
    add_model,
    calibration_samples,
    check_least,
    load_answerer,
    split_names,
)
from tove_llava.core.errors import ConfigError
from tove_llava.core.files import check_writable

if TYPE_CHECKING:
    from tove_llava.analysis.speed import Fit

HELP = "remove experts: the detach curve, or a smaller checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="results of --curve, or the new checkpoint")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--curve", action="store_true", help="score and speed at each step, down to plain CLIP")
    what.add_argument("--experts", metavar="A,B", help="remove these experts")
    what.add_argument("--keep", type=int, metavar="N", help="keep the N experts that contribute most")
    what.add_argument(
        "--max-latency-ms",
        type=float,
        metavar="X",
        help="drop the least contributing experts until the tower takes at most X ms for one image on this device",
    )
    parser.add_argument(
        "--contributions", metavar="FILE", help="contributions.json of this model, instead of measuring with --data"
    )
    add_calibration(parser, required=False)
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    from tove_llava.analysis.detach import check_out, detach_checkpoint
    from tove_llava.checkpoints.manifest import Manifest
    from tove_llava.core.logs import quiet_transformers
    from tove_llava.serve.models import find_model

    _check(args)
    quiet_transformers()
    find_model(args.model)
    if args.curve:
        return _curve(args)
    Manifest.read(args.model)
    check_out(args.out)
    fit = None
    if args.experts is not None:
        experts = split_names(args.experts)
        if not experts:
            raise ConfigError("--experts names no expert; write them separated by commas")
    elif args.max_latency_ms is not None:
        fit = _fit(args)
        experts = list(fit.removed)
    else:
        experts = _least(args)
    found = detach_checkpoint(args.model, args.out, experts)
    text, record = str(found), {"out": args.out, "kept": found.kept, "removed": found.removed}
    if fit is not None:
        text += f"; tower {fit}"
        record |= {"latency_ms": fit.milliseconds, "latency_ms_whole": fit.whole}
    _print(args, text, record)
    return 0


def _check(args: argparse.Namespace) -> None:
    check_least(args, "--batch-size", "--limit")
    check_least(args, "--keep", least=0)
    if args.max_latency_ms is not None and not args.max_latency_ms > 0:
        raise ConfigError(f"--max-latency-ms must be above 0, not {args.max_latency_ms:g}")
    if args.curve and args.data is None:
        raise ConfigError("--curve needs --data: each step is scored on it")
    if args.experts is None and args.data is None and args.contributions is None:
        raise ConfigError(
            "give --data to measure which experts contribute least, or --contributions with the contributions.json of "
            "this model"
        )


def _curve(args: argparse.Namespace) -> int:
    from tove_llava.analysis.curve import curve_table, detach_curve, save_curve
    from tove_llava.analysis.plots import figure

    check_writable(args.out)
    figure(1, 1)  # fails now, not at the end, where matplotlib is missing
    answerer, samples, ranking = _ranked(args)
    steps = detach_curve(answerer, samples, ranking, args.batch_size)
    record = save_curve(steps, args.out, answerer, args.model, samples, args.data, args.batch_size)
    _print(args, curve_table(steps), record)
    return 0


def _fit(args: argparse.Namespace) -> "Fit":
    """Choose the experts that --max-latency-ms removes."""
    from tove_llava.analysis.speed import fit_latency

    answerer, _, ranking = _ranked(args)
    return fit_latency(answerer.tower, ranking, args.max_latency_ms)


def _least(args: argparse.Namespace) -> list[str]:
    """Choose the experts that --keep removes."""
    _, _, ranking = _ranked(args)
    if args.keep > len(ranking):
        raise ConfigError(f"--keep {args.keep}: this model has {len(ranking)} experts ({', '.join(ranking)})")
    return ranking[: len(ranking) - args.keep]


def _ranked(args: argparse.Namespace) -> Any:
    """Return the model, the samples (None without --data), and the ranking."""
    from tove_llava.analysis.contributions import (
        measure_contributions,
        read_ranking,
        save_contributions,
    )
    from tove_llava.analysis.measure import tower_with_experts
    from tove_llava.eval.provenance import model_fingerprint

    answerer = load_answerer(args)
    attached = tower_with_experts(answerer).config.attached_experts
    samples: Any = None if args.data is None else calibration_samples(args, answerer)
    if args.contributions is not None:
        ranking = read_ranking(args.contributions, attached, model_fingerprint(answerer, args.model))
    else:
        found = measure_contributions(answerer, samples, args.batch_size)
        if args.curve:
            save_contributions(found, args.out, answerer, args.model, samples, args.data)
        ranking = found.ranking
    return answerer, samples, ranking


def _print(args: argparse.Namespace, text: str, record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False) if args.json else text)
