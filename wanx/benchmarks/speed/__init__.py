"""How fast a bundle is, what it takes, and how close that is to what the machine can do."""
