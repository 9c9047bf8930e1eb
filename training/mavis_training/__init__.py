"""Produce value models for `mavis_logits`: collect trees of rollouts, label, train, evaluate, publish."""
