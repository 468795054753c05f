"""The only place that knows transformers: loading, running and decoding a base model."""
