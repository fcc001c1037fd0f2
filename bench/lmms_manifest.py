"""What lmms-eval finds under its entry point `lmms_eval.models`: where the adapter is."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """`--model llava_hd`. The class is of lmms-eval's "simple" kind, the one whose tasks may also
    ask for log-likelihoods."""
    return ModelManifest(
        model_id="llava_hd",
        simple_class_path="llava_hd.bench.lmms_adapter.LlavaHDAdapter",
        aliases=("llava_1_5_hd",),
    )
