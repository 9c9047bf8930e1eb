"""Steering within `generate`: as a logits processor, or as a strategy that decodes in its place."""
