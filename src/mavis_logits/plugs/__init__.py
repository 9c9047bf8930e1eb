"""Where others plug steering in: pipelines, and code on the Hub."""
