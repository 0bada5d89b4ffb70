"""Other libraries' own ways to attach ScaLoRA: transformers' callback, PEFT's factory."""
