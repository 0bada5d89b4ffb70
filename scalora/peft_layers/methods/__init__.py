"""PEFT's own methods on a re-based model: made right, refused, or warned about."""
