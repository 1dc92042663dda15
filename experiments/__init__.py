"""Tables of the papers: which runs make them, what was published, and how to run them."""
