"""Trees of completions: kept in a store, with rewards, targets, and packed for training."""
