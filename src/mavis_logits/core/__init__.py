"""The ground: settings, the arithmetic of the tilt, objectives; nothing here knows a model."""
