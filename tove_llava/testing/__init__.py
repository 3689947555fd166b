"""Checks that you run on your own expert, fusion, benchmark or template, as ``check_estimator`` does in scikit-learn.

``tove-llava check FILE.py`` runs them on everything that a file registers.
"""

import os
from collections.abc import Callable
from functools import partial

from tove_llava.core.plugins import plugin_of
from tove_llava.data.templates.base import TEMPLATES
from tove_llava.eval.benchmarks import BENCHMARKS
from tove_llava.experts import EXPERTS
from tove_llava.testing.benchmark_contract import check_benchmark
from tove_llava.testing.contract import ContractError
from tove_llava.testing.expert_contract import check_expert
from tove_llava.testing.fusion_contract import check_fusion
from tove_llava.testing.template_contract import check_template
from tove_llava.tower.tower_config import FUSIONS

__all__ = ["ContractError", "check_benchmark", "check_expert", "check_fusion", "check_template", "own_parts"]


def own_parts(
    data_root: str | os.PathLike[str] | None = None, tokenizer: str = "bundled:llm"
) -> dict[str, Callable[[], list[str]] | None]:
    """List the parts that plugins register, each with its check.

    Args:
        data_root: evaluation data; without it a benchmark has None instead of a check.
        tokenizer: source of the tokenizer for templates.
    """
    parts: dict[str, Callable[[], list[str]] | None] = {}
    for name in FUSIONS:
        if plugin_of(FUSIONS.get(name)):
            parts[f"fusion {name!r}"] = partial(check_fusion, name)
    for name in EXPERTS:
        for cls in filter(plugin_of, EXPERTS.get(name).values()):
            source = {"source": cls.default_source} if cls.default_source else {}
            parts[f"expert {name!r}"] = partial(check_expert, {"name": name, **source})
    for name in TEMPLATES:
        if plugin_of(TEMPLATES.get(name)):
            parts[f"template {name!r}"] = partial(check_template, name, tokenizer)
    for name in BENCHMARKS:
        if plugin_of(BENCHMARKS.get(name)):
            check = None if data_root is None else partial(check_benchmark, name, data_root)
            parts[f"benchmark {name!r}"] = check
    return parts
