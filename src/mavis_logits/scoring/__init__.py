"""Value models asked for the values of k candidates a row, over a cache that follows the text."""
