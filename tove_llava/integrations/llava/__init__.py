"""The tower in haotian-liu/LLaVA: ``--vision_tower tove:<preset, preset.yaml or checkpoint folder>``.

Two lines in a launcher, before a model is built::

    from tove_llava.integrations.llava import register
    register()

docs/guides/original-llava.md shows the rest.
"""

from tove_llava.integrations.llava.registration import register
from tove_llava.integrations.llava.tower import ToveVisionTower

__all__ = ["ToveVisionTower", "register"]
