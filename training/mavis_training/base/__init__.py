"""The ground: files that appear whole or not at all, settings, processes, prompts."""
