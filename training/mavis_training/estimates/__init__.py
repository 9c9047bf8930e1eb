"""What a job would cost, found out by doing a little of it."""
