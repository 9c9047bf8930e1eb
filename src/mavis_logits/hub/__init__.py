"""Publishing on the Hugging Face Hub: model cards, value functions, bundles."""
