"""``mavis ui``: a page to try steering on."""
