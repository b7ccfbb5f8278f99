"""From a data set to batches of a long-tailed split: sources, published lists, count profiles, splits, views, loaders.

`config.py` is the recipe's section; `longtailed.py` puts the rest together.
"""
