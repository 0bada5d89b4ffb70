"""The only room that knows transformers' models: their classes, configs, ties and decoders.

It knows nothing of adapters beyond the entries of an adapter's config that name a model's class.
"""

from scalora.transformers_models.encoder_decoder import decoder_of, padding_of
from scalora.transformers_models.loading import (
    has_other_vocabulary,
    is_stand_in,
    model_class,
    model_without_weights,
    pretrained_model,
    recorded_config,
)
from scalora.transformers_models.quiet import without_load_reports
from scalora.transformers_models.ties import (
    differing_weights,
    keeping_ties,
    settle_ties,
    shared_weights,
    write_model,
)

__all__ = [
    "decoder_of",
    "differing_weights",
    "has_other_vocabulary",
    "is_stand_in",
    "keeping_ties",
    "model_class",
    "model_without_weights",
    "padding_of",
    "pretrained_model",
    "recorded_config",
    "settle_ties",
    "shared_weights",
    "without_load_reports",
    "write_model",
]
