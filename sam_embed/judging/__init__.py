"""How right matches are, and pictures of them."""
