"""What the library asks of a language model, answered in one place: `Backbone`."""

from .anatomy import UnsupportedModel
from .backbone import Backbone
from .probe import Reading

__all__ = ["Backbone", "Reading", "UnsupportedModel"]
