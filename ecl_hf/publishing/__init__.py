"""What leaves a run for other people: model cards, timm and ONNX exports, uploads.

`config.py` has the recipe's section `hub`.
"""
