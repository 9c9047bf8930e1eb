"""The tuned policies that value functions are compared with: from the same trees or prompts, by TRL, as adapters."""
