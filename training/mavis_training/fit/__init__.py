"""From a model, prompts and rewards to a bundle, in the time that there is: `mavis fit`."""
