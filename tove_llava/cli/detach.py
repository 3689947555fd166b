"""Take experts out of a trained model.

--curve shows what it costs: experts are removed one by one, the least contributing first, with loss, accuracy and speed
at each step. --experts, --keep and --max-latency-ms write a smaller checkpoint to --out, which needs the removed
experts' weights no more and computes exactly what the whole model does with them masked. Without any expert left it is
CLIP alone.
"""

import argparse
from typing import TYPE_CHECKING, Any

from tove_llava.cli._loading import add_loading_arguments, loading_options
from tove_llava.cli.contributions import add_data_arguments

if TYPE_CHECKING:
    from tove_llava.analysis.speed import Fit

HELP = "take experts out: the detach curve, or a smaller checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder that training wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="results of --curve, or the new checkpoint")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--curve", action="store_true", help="score and speed at each step, down to CLIP alone")
    what.add_argument("--experts", metavar="A,B", help="take these experts out")
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
    add_data_arguments(parser, required=False)
    add_loading_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    from tove_llava.analysis.detach import check_out, detach_checkpoint
    from tove_llava.checkpoints.manifest import Manifest
    from tove_llava.core.errors import ConfigError
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
        experts = [name.strip() for name in args.experts.split(",") if name.strip()]
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
    from tove_llava.cli.contributions import check_counts
    from tove_llava.core.errors import ConfigError

    check_counts(args)
    if args.keep is not None and args.keep < 0:
        raise ConfigError(f"--keep must be 0 or more, not {args.keep}")
    if args.max_latency_ms is not None and not args.max_latency_ms > 0:
        raise ConfigError(f"--max-latency-ms must be above 0, not {args.max_latency_ms:g}")
    if args.curve and args.data is None:
        raise ConfigError("--curve needs --data: each step is scored on it")
    if args.experts is None and args.data is None and args.contributions is None:
        raise ConfigError(
            "which experts contribute least has to be known: give --data to measure it, or --contributions with the "
            "contributions.json of this model"
        )


def _curve(args: argparse.Namespace) -> int:
    from tove_llava.analysis.curve import curve_table, detach_curve, save_curve
    from tove_llava.analysis.plots import figure

    figure(1, 1)  # says now, not at the end, that matplotlib is missing
    answerer, samples, ranking = _ranked(args)
    steps = detach_curve(answerer, samples, ranking, args.batch_size)
    record = save_curve(steps, args.out, answerer, args.model, samples, args.data, args.batch_size)
    _print(args, curve_table(steps), record)
    return 0


def _fit(args: argparse.Namespace) -> "Fit":
    """The experts to take out by --max-latency-ms, and the time that is reached."""
    from tove_llava.analysis.speed import fit_latency

    answerer, _, ranking = _ranked(args)
    return fit_latency(answerer.tower, ranking, args.max_latency_ms)


def _least(args: argparse.Namespace) -> list[str]:
    """The experts to take out by --keep."""
    from tove_llava.core.errors import ConfigError

    _, _, ranking = _ranked(args)
    if args.keep > len(ranking):
        raise ConfigError(f"--keep {args.keep}: this model has {len(ranking)} experts ({', '.join(ranking)})")
    return ranking[: len(ranking) - args.keep]


def _ranked(args: argparse.Namespace) -> Any:
    """(model, samples (None without --data), its experts, the least contributing first)."""
    from tove_llava.analysis.contributions import (
        measure_contributions,
        read_ranking,
        save_contributions,
    )
    from tove_llava.analysis.measure import tower_with_experts
    from tove_llava.analysis.samples import load_samples
    from tove_llava.eval.provenance import model_fingerprint
    from tove_llava.inference.generation import Answerer

    answerer = Answerer.load(args.model, **loading_options(args))
    attached = tower_with_experts(answerer).config.attached_experts
    samples: Any = None
    if args.data is not None:
        samples = load_samples(args.data, args.image_folder, answerer, args.model, args.limit)
    if args.contributions is not None:
        ranking = read_ranking(args.contributions, attached, model_fingerprint(answerer, args.model))
    else:
        found = measure_contributions(answerer, samples, args.batch_size)
        if args.curve:
            save_contributions(found, args.out, answerer, args.model, samples, args.data)
        ranking = found.ranking
    return answerer, samples, ranking


def _print(args: argparse.Namespace, text: str, record: dict) -> None:
    import json

    print(json.dumps(record, ensure_ascii=False) if args.json else text)
