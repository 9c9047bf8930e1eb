"""The code that a bundle's repository holds for `model.generate(custom_generate="org/bundle", trust_remote_code=True)`.

It is thin: the repository's name, and a call of `mavis_logits.plugs.custom_generate.steered_generate`.
"""

from __future__ import annotations

from importlib.metadata import version

GENERATE_FILE, REQUIREMENTS_FILE = "custom_generate/generate.py", "custom_generate/requirements.txt"
_TEMPLATE = '''"""Steers by the value functions of this repository; all the work is done by the package mavis-logits."""

from mavis_logits.hub.remote import steered_generate

REPOSITORY = "{repository}"


def generate(model, **arguments):
    """`GenerationMixin.generate` with `mavis_weights=`, `mavis_beta=`, `mavis_top_k=` and so on."""
    return steered_generate(model, REPOSITORY, __file__, **arguments)
'''


def generate_source(repository: str) -> str:
    """The text of `custom_generate/generate.py` for a bundle in `repository`."""
    return _TEMPLATE.format(repository=repository)


def requirements() -> str:
    """The text of `custom_generate/requirements.txt`, which transformers checks before it runs the code."""
    return f"mavis-logits>={version('mavis-logits')}\n"
