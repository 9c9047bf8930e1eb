"""A reward in ten lines: an answer that comes to an end, in few words."""


def concise(prompts, completions, **columns):
    """From 0 to 1: 0 for an answer that breaks off or says nothing, else the higher the fewer words it has."""
    rewards = []
    for text in completions:
        words, ends = len(text.split()), text.rstrip().endswith((".", "!", "?"))
        rewards.append(max(0.0, 1 - words / 40) if ends and words > 3 else 0.0)
    return rewards
