"""Value functions fitted to targets: batches, trainers, metrics."""
