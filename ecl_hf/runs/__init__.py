"""A run and its folder: the recipe, what is written and how it stays whole, locks, interruption, launching.

`recipe.py` puts the sections of all rooms together.
"""
