"""The parts of policy iteration (Algorithm 1): settings, stages on disk, the report."""
