"""What exists only while a model is trained: the task, key encoders, first weights, memory, checks of the numbers.

`config.py` has the recipe's sections of it. The loop itself is in `training/train.py`.
"""
