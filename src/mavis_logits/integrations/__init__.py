"""Engines that serve many requests at once, each with its own weights. What is here knows no engine; folders do."""
